-- The requests of `python benchmarks/serve.py`, for wrk. Arguments: file of request bodies (a line
-- each), then the mean pause in milliseconds between the requests of one connection (0: none).
-- Pauses are drawn from an exponential distribution, so that many connections together arrive like
-- a Poisson process that does not wait for answers.
local bodies, pause, number = {}, 0, 0
local threads = {}

function setup(thread)
  thread:set("seed", #threads + 1)
  table.insert(threads, thread)
end

function init(args)
  math.randomseed(seed)
  for line in io.lines(args[1]) do bodies[#bodies + 1] = line end
  number = math.random(#bodies)
  pause = tonumber(args[2])
  ok, busy, late, other = 0, 0, 0, 0
end

function delay()
  if pause == 0 then return 0 end
  return math.floor(-pause * math.log(1 - math.random()) + 0.5)
end

function request()
  number = number % #bodies + 1
  return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, bodies[number])
end

function response(status)
  if status == 200 then ok = ok + 1
  elseif status == 429 then busy = busy + 1
  elseif status == 504 then late = late + 1
  else other = other + 1 end
end

function done(summary, latency)
  local ok, busy, late, other = 0, 0, 0, 0
  for _, thread in ipairs(threads) do
    ok, busy = ok + thread:get("ok"), busy + thread:get("busy")
    late, other = late + thread:get("late"), other + thread:get("other")
  end
  local all = math.max(1, ok + busy + late + other)
  -- Refusals are faster than any answer, so the answers are the slow end of all latencies.
  local function of_answers(share) return latency:percentile(100 - (100 - share) * ok / all) / 1000 end
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write
  io.stderr:write(string.format(
    '{"ok": %d, "busy": %d, "late": %d, "other": %d, "connection_errors": %d, "seconds": %.3f, ' ..
    '"p50_ms": %.2f, "p90_ms": %.2f, "p99_ms": %.2f, "max_ms": %.2f}\n',
    ok, busy, late, other, failed, summary.duration / 1e6,
    of_answers(50), of_answers(90), of_answers(99), latency.max / 1000))
end
