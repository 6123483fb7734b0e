-- wrk asks for updates: each for a random registered transaction, each different from all others.
-- From the environment: BENCH_KEY (secret key), BENCH_FIRST and BENCH_IDS (transactions tFIRST and so many on).
local first = tonumber(os.getenv("BENCH_FIRST"))
local ids = tonumber(os.getenv("BENCH_IDS"))
local head = "PUT /campaignapi/resources/v3/voicecampaigntransactions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
  .. os.getenv("BENCH_KEY") .. "\r\nContent-Type: application/json\r\nContent-Length: "
local threads = 0
local sent = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init()
  math.randomseed(os.time() * 31 + number * 7919)
end

function request()
  sent = sent + 1
  local body = string.format(
    '{"transaction-id":"t%d","call-starttime":"2026-03-01 09:00:00.000","call-endtime":"2026-03-01 09:%02d:%02d.%03d",'
      .. '"call-source":"2","call-state":"5","drop-code":"2005","dtmf-digits":"1","message":"Call finished %d-%d",'
      .. '"times-attempted":"%d","a-party":"+15550100","b-party":"+15550199"}',
    first + math.random(0, ids - 1), math.random(1, 59), math.random(0, 59), math.random(0, 999), number, sent, math.random(0, 3))
  return head .. #body .. "\r\n\r\n" .. body
end
