-- Says whether all events behind a position are still there: the entry of exactly this position is, or it is the
-- newest; no mark stands behind it (see check.lua); and nothing behind it is too old or too much.
--
-- keys: the topic's stream. args: the position, most events, most bytes, ttl_s.
-- Returns {fault, newest position, time in ms}; the fault is empty where they are.

local key, since = KEYS[1], ARGV[1]
local max_events, max_bytes, ttl_s = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local function parts(id)
  local ms, n = id:match('^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(n)
end

local function field(entry, name)
  for at = 1, #entry[2], 2 do
    if entry[2][at] == name then return entry[2][at + 1] end
  end
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
local newest = last and last[1]
if not last then
  if redis.call('EXISTS', key) == 0 then
    newest = string.format('%.0f-0', now)
    redis.call('XADD', key, newest, 'b', '1')
    redis.call('EXPIRE', key, ttl_s + 300)
    return {'unknown position', newest, now}
  end
  local info = redis.call('XINFO', 'STREAM', key)
  for at = 1, #info, 2 do
    if info[at] == 'last-generated-id' then newest = info[at + 1] end
  end
end
if since == newest then
  return {'', newest, now}
end

local own = redis.call('XRANGE', key, since, since)[1]
if not own then
  local first = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
  local ms, n = parts(since)
  local first_ms, first_n = parts(first and first[1] or newest)
  return {ms <= first_ms and n < first_n and 'history expired' or 'unknown position', newest, now}
end

local ms, n = parts(since)
local mark = field(last, 'm') and newest or field(last, 'f')
if mark then
  local mark_ms, mark_n = parts(mark)
  if mark_ms > ms or (mark_ms == ms and mark_n > n) then
    return {'history forked', newest, now}
  end
end
local _, newest_n = parts(newest)
if newest_n - n > max_events or tonumber(field(last, 'z') or 0) - tonumber(field(own, 'z') or 0) > max_bytes then
  return {'too many events missed', newest, now}
end
local following = redis.call('XRANGE', key, '(' .. since, '+', 'COUNT', 1)[1]
local following_ms = parts(following[1])
if following_ms < now - ttl_s * 1000 then
  return {'history expired', newest, now}
end
return {'', newest, now}
