-- Says where a topic's history stands, to the caller and on its channel, and whether it has lost what was heard of it.
--
-- keys: the topic's stream. args: the position heard last ("" for none), ttl_s.
-- Returns the newest position. It is published as a notice, ":<position>:", which comes to subscribers in order with
-- the events: one that has not heard so far finds out, and one that has just come knows where it begins.
--
-- Where the entry of the position heard last is missing among younger ones, or before none, an acknowledged event was
-- lost in a failover: a mark is left, an entry without an event, behind which no older position counts as recovered.

local key, heard, ttl_s = KEYS[1], ARGV[1], tonumber(ARGV[2])

local now = now_ms()
local newest, total, mark = state_of(key)
if not newest then
  newest = begin(key, now)
end

if heard ~= '' and heard ~= newest and #redis.call('XRANGE', key, heard, heard) == 0 then
  local first = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
  if first and not is_before(heard, first[1]) and not (mark and is_before(heard, mark)) then
    local ms, n = parts(newest)
    local heard_ms = parts(heard)
    newest = whole(math.max(ms, now, heard_ms + 1)) .. '-' .. whole(n + 1)
    redis.call('XADD', key, newest, 'm', heard, 'z', whole(total))
  end
end

redis.call('EXPIRE', key, ttl_s + 300)
redis.call('PUBLISH', key, ':' .. newest .. ':')
return newest
