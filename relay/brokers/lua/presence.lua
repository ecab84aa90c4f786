-- Renews a node's lease and publishes a message on behalf of it, as one step.
--
-- keys: the leases of all nodes, by when they end; the numbers of their last writes.
-- args: the node, its lease in ms, a channel, the message, the number of the last write that was answered, whether
-- nothing was written yet ("1" or "0").
-- Returns whether the lease still held and nothing written is lost, then each node with the ms that are left of its
-- lease; negative where it is over.

local leases, node, lease_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local ends_at = redis.call('ZSCORE', leases, node)
redis.call('ZADD', leases, now + lease_ms, node)
redis.call('PUBLISH', ARGV[3], ARGV[4])

local written = redis.call('ZSCORE', KEYS[2], node)
if ARGV[6] == '1' and not written then
  written = 0
  redis.call('ZADD', KEYS[2], 0, node)
end
local is_held = ends_at and tonumber(ends_at) >= now
local is_kept = written and math.abs(tonumber(written)) >= tonumber(ARGV[5])

local reply = {(is_held and is_kept) and 1 or 0}
local nodes = redis.call('ZRANGE', leases, 0, -1, 'WITHSCORES')
for at = 1, #nodes, 2 do
  reply[#reply + 1] = nodes[at]
  reply[#reply + 1] = math.floor(tonumber(nodes[at + 1]) - now)
end
return reply
