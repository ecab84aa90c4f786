-- Appends an event to a topic's history and publishes it with its position, as one step.
--
-- keys: the topic's stream, whose name is the topic's channel too.
-- args: event, payload, size, ttl_s, sender ("" for none), payload_max_bytes.
-- Returns the position, "<ms>-<n>". ms does not fall and n is consecutive for the life of the stream, so that a hole
-- shows. The payload is never decoded: cjson would change numbers and empty arrays.

local key = keys[1]
local event, payload, sender = args[1], args[2], args[5] or ''
local size, ttl_s, max_bytes = tonumber(args[3]), tonumber(args[4]), tonumber(args[6] or '1048576')

if not event or not payload or not size or not ttl_s or not max_bytes then
  return redis.error_reply('ERR expected event, payload, size and ttl_s after the key')
end
if size < 1 or size > 100000 or ttl_s < 1 or ttl_s > 2592000 then
  return redis.error_reply('ERR expected a size of 1 to 100000 and a ttl_s of 1 to 2592000')
end
if event == '' or #event > 255 or event:find('[%c:]') or event:find('^phx_') or event:find('^chan_reply_') then
  return redis.error_reply('ERR expected an event name of 1 to 255 bytes without colon, not phx_ or chan_reply_')
end
if #payload > max_bytes then
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
