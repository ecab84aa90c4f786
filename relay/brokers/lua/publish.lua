-- Appends an event to a topic's history and publishes it with its position, as one step.
--
-- keys: the topic's stream, whose name is the topic's channel too.
-- args: event, payload, size, ttl_s, sender ("" for none), payload_max_bytes.
-- Returns the position, "<ms>-<n>". ms does not fall and n is consecutive for the life of the stream, so that a hole
-- shows. The payload is never decoded: cjson would change numbers and empty arrays.

local function is_utf8(text)
  if not text:find('[\128-\255]') then return true end
  for _, form in ipairs({
    '[\194-\223][\128-\191]', '\224[\160-\191][\128-\191]', '\237[\128-\159][\128-\191]',
    '[\225-\236\238\239][\128-\191][\128-\191]', '\240[\144-\191][\128-\191][\128-\191]',
    '[\241-\243][\128-\191][\128-\191][\128-\191]', '\244[\128-\143][\128-\191][\128-\191]',
  }) do
    text = text:gsub(form, '.')
  end
  return not text:find('[\128-\255]')
end

-- Also false for what is no number: Redis would refuse it after the event was appended.
local function is_whole(number, most)
  return number >= 1 and number <= most and number % 1 == 0
end

local key = keys[1]
local event, payload, sender = args[1], args[2], args[5] or ''
local size, ttl_s, max_bytes = tonumber(args[3]), tonumber(args[4]), tonumber(args[6] or '1048576')

if not event or not payload or not size or not ttl_s or not max_bytes then
  return redis.error_reply('ERR expected event, payload, size and ttl_s after the key')
end
if not is_whole(size, 100000) or not is_whole(ttl_s, 2592000) then
  return redis.error_reply('ERR expected a size of 1 to 100000 and a ttl_s of 1 to 2592000, as whole numbers')
end
if event == '' or #event > 255 or event:find('[%c:]') or event:find('^phx_') or event:find('^chan_reply_') then
  return redis.error_reply('ERR expected an event name of 1 to 255 bytes without colon, not phx_ or chan_reply_')
end
if event:find('\194[\128-\159]') or not is_utf8(event) then
  return redis.error_reply('ERR expected an event name of UTF-8 without control characters')
end
if not (#payload <= max_bytes) then
  return redis.error_reply('ERR expected a payload of at most ' .. max_bytes .. ' bytes, got ' .. #payload)
end

local newest, total, mark = state_of(key)
local ms, n = parts(newest or '0-0')
local id = whole(math.max(ms, now_ms())) .. '-' .. whole(n + 1)

local entry = {'e', event, 'd', payload, 'z', whole(total + #event + #payload)}
if mark then
  entry[#entry + 1] = 'f'
  entry[#entry + 1] = mark
end
if sender ~= '' then
  entry[#entry + 1] = 's'
  entry[#entry + 1] = sender
end
redis.call('XADD', key, 'MAXLEN', '=', size, id, unpack(entry))
redis.call('EXPIRE', key, ttl_s + 300)
redis.call('PUBLISH', key, ':' .. id .. (sender ~= '' and '*' .. sender or '') .. ':' .. event .. ':' .. payload)
return id
