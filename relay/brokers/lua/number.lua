-- Numbers a node's write, in the transaction that makes it.
--
-- keys: the numbers of all nodes' last writes; negative where not all members of the node are there.
-- args: the node, the number, that of the last write that was answered, whether all members are there ("1" or "0").
-- Returns whether what was written before is still there.

local written = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0)
local is_kept = math.abs(written) >= tonumber(ARGV[3])
local sign = (is_kept and ARGV[4] == '1') and 1 or -1
redis.call('ZADD', KEYS[1], sign * tonumber(ARGV[2]), ARGV[1])
return is_kept and 1 or 0
