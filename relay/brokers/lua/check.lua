-- Says where a topic's history stands, to the caller and on its channel, and whether it has lost what was heard of it.
--
-- keys: the topic's stream. args: the position heard last ("" for none), ttl_s.
-- Returns the newest position. It is published as a notice, ":<position>:", which comes to subscribers in order with
-- the events: one that has not heard so far finds out, and one that has just come knows where it begins.
--
-- A stream without entries gets one without an event, else "nothing yet" and "lost" would look alike. Where the entry
-- of the position heard last is missing among younger ones, or before none, an acknowledged event was lost in a
-- failover: a mark is left, an entry without an event, behind which no older position counts as recovered.

local key, heard, ttl_s = KEYS[1], ARGV[1], tonumber(ARGV[2])

local function parts(id)
  local ms, n = id:match('^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(n)
end

local function is_before(one, other)
  local ms, n = parts(one)
  local other_ms, other_n = parts(other)
  return ms < other_ms or (ms == other_ms and n < other_n)
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local newest, mark
local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
if last then
  newest = last[1]
  for at = 1, #last[2], 2 do
    if last[2][at] == 'f' then mark = last[2][at + 1] end
    if last[2][at] == 'm' then mark = newest end
  end
elseif redis.call('EXISTS', key) == 1 then
  local info = redis.call('XINFO', 'STREAM', key)
  for at = 1, #info, 2 do
    if info[at] == 'last-generated-id' then newest = info[at + 1] end
  end
else
  newest = string.format('%.0f-0', now)
  redis.call('XADD', key, newest, 'b', '1')
end

if heard ~= '' and heard ~= newest and #redis.call('XRANGE', key, heard, heard) == 0 then
  local first = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
  if first and not is_before(heard, first[1]) and not (mark and is_before(heard, mark)) then
    local ms, n = parts(newest)
    local heard_ms = parts(heard)
    newest = string.format('%.0f-%.0f', math.max(ms, now, heard_ms + 1), n + 1)
    local total = '0'
    for at = 1, #last[2], 2 do
      if last[2][at] == 'z' then total = last[2][at + 1] end
    end
    redis.call('XADD', key, newest, 'm', heard, 'z', total)
  end
end

redis.call('EXPIRE', key, ttl_s + 300)
redis.call('PUBLISH', key, ':' .. newest .. ':')
return newest
