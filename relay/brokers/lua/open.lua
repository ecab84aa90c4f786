-- Says whether all events behind a position are still there: the entry of exactly this position is, or it is the
-- newest; no mark stands behind it (see check.lua); and nothing behind it is too old or too much.
--
-- keys: the topic's stream. args: the position, most events, most bytes, ttl_s.
-- Returns {fault, newest position, time in ms}; the fault is empty where they are.

local key, since = KEYS[1], ARGV[1]
local max_events, max_bytes, ttl_s = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local now = now_ms()
local newest, total, mark = state_of(key)
if not newest then
  newest = begin(key, now)
  redis.call('EXPIRE', key, ttl_s + 300)
  return {'unknown position', newest, now}
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

if mark and is_before(since, mark) then
  return {'history forked', newest, now}
end
local _, n = parts(since)
local _, newest_n = parts(newest)
if newest_n - n > max_events or total - tonumber(fields_of(own).z or 0) > max_bytes then
  return {'too many events missed', newest, now}
end
local following = redis.call('XRANGE', key, '(' .. since, '+', 'COUNT', 1)[1]
local following_ms = parts(following[1])
if following_ms < now - ttl_s * 1000 then
  return {'history expired', newest, now}
end
return {'', newest, now}
