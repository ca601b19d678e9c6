-- POST the bodies that lie as 0, 1, 2... in a folder, in turn: wrk -s benchmarks/wrk.lua URL -- FOLDER CONTENT_TYPE
-- Prints one line of JSON at the end, since wrk's own table has no p95.
local requests, turn = {}, 0

function init(arguments)
    wrk.method = "POST"
    wrk.headers["Content-Type"] = arguments[2]
    local number = 0
    local file = io.open(arguments[1] .. "/0", "rb")
    while file do
        requests[number + 1] = wrk.format(nil, nil, nil, file:read("*a"))
        file:close()
        number = number + 1
        file = io.open(arguments[1] .. "/" .. number, "rb")
    end
end

function request()
    turn = turn % #requests + 1
    return requests[turn]
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p95_ms": %.3f, "p99_ms": %.3f, "errors": %d}\n',
        summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
        latency:percentile(99) / 1e3, errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
