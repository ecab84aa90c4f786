-- What the scripts of histories share; it stands before each of them.
--
-- An entry of a stream: e the event, d the payload, z the bytes of all events so far, f the last mark before it,
-- s the sender. A mark has m, the position that was lost, and z. The first entry may have b alone: no event yet.

local function parts(id)
  local ms, n = id:match('^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(n)
end

local function is_before(one, other)
  local ms, n = parts(one)
  local other_ms, other_n = parts(other)
  return ms < other_ms or (ms == other_ms and n < other_n)
end

-- A number as Redis takes it: Lua would write large ones with an exponent.
local function whole(number)
  return string.format('%.0f', number)
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function fields_of(entry)
  local fields = {}
  for at = 1, #entry[2], 2 do
    fields[entry[2][at]] = entry[2][at + 1]
  end
  return fields
end

-- Where a history stands: its newest position, nil where there is no stream; the bytes of all its events; its last mark.
local function state_of(key)
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  if last then
    local fields = fields_of(last)
    return last[1], tonumber(fields.z or 0), fields.m and last[1] or fields.f
  end
  local newest = nil
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for at = 1, #info, 2 do
      if info[at] == 'last-generated-id' then newest = info[at + 1] end
    end
  end
  return newest, 0, nil
end

-- Begins a history with an entry without an event, else "nothing yet" and "lost" would look alike.
local function begin(key, now)
  local newest = whole(now) .. '-0'
  redis.call('XADD', key, newest, 'b', '1')
  return newest
end

