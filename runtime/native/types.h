// What the parts of a native simulation tell each other: plain structs, requests and instances by
// number. Each means what its namesake in Python means (runtime/plan.py, runtime/engines,
// runtime/loop.py); what only a log or a digest needs is left out.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace sagec {

using i32 = std::int32_t;
using i64 = std::int64_t;

constexpr i64 UNBOUNDED = (i64(1) << 31) - 1; // tokens of a request that goes on until it stops
constexpr i32 NOBODY = -1;                    // no request, instance or plan

// What is left to Python, which simulates it from the beginning; the text is the reason.
struct NotCovered : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Mode : i32 { strict, time_share, hybrid };

// A request as a client sent it. hashes: of the whole blocks of its prompt, where caches are on, as
// dense numbers. hashes_given: by its client; resumed, it has no others.
struct Request {
    i64 prompt_tokens = 0;
    i64 max_output_tokens = UNBOUNDED;
    i64 arrival_us = 0;
    const i64 *hashes = nullptr;
    i64 num_hashes = 0;
    bool hashes_given = false;
};

// A request as an instance is sent it: its output so far is part of the prompt.
struct Sent {
    i32 request = NOBODY;
    i64 prompt_tokens = 0;
    i64 max_output_tokens = 1;
};

// A plan. Rows are numbered in it; `requests` says who they are.
struct Plan {
    struct Chunk {
        i32 step, row;
        i64 begin, end;
    };
    struct Decode {
        i32 row;
        i32 begin_step;
        i64 until_tokens;
    };
    struct Move {
        i32 row;
        i32 peer;
    }; // peer: the other instance

    i64 round = 0;
    i32 instance = NOBODY;
    bool mixes_phases = true;
    i32 num_steps = 0;
    i64 max_step_tokens = 0;
    std::vector<i32> requests;
    std::vector<i64> kv_blocks; // of each row
    std::vector<Chunk> chunks;  // by step, then as computed
    std::vector<Decode> decodes;
    std::vector<i32> preemptions; // rows, recomputed later
    std::vector<Move> imports, exports;
};

// KV on its way.
struct Handle {
    i32 request = NOBODY;
    Sent sent;
    i32 source = NOBODY, target = NOBODY;
    i64 output_tokens = 0;
    i64 computed_tokens = 0;
    i64 num_bytes = 0;
    i64 begin_us = 0;
};

// What an instance says; which fields count depends on `kind`.
struct Event {
    enum Kind : i32 { stepped, exported, imported, cached, preempted, plan_done, cancelled, failed };
    struct Chunk {
        i32 request;
        i64 begin, end;
    };
    struct Advance {
        i32 request;
        i64 first, count;
    }; // tokens, by their index in the output
    struct Reuse {
        i32 request;
        i64 tokens;
    };

    Kind kind = stepped;
    i32 instance = NOBODY;
    i64 plan_round = 0; // stepped, plan_done: the round of the plan
    i64 step = 0;       // stepped: the last of `steps` like steps
    i64 steps = 1;
    i64 begin_us = 0, end_us = 0; // stepped, imported; exported: end_us, when it arrives
    i64 kv_blocks_used = 0;
    std::vector<Chunk> chunks;
    std::vector<i32> decodes;
    std::vector<Advance> advanced;
    std::vector<i32> finished; // all of them by length
    std::vector<Reuse> reused;
    Handle handle;                    // exported
    i32 request = NOBODY;             // imported, preempted, cancelled, failed
    i32 source = NOBODY;              // imported
    i64 num_bytes = 0;                // imported
    i64 kept_tokens = 0;              // preempted
    std::vector<i64> stored, evicted; // cached: hashes
    std::string error;                // failed
};

} // namespace sagec
