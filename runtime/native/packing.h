// What each instance has to do, and which engine call computes what: runtime/direct/work.py and
// runtime/direct/packing.py.
#pragma once

#include <memory>
#include <vector>

#include "planner.h"

namespace sagec {

// A request at an instance. fresh: its number among those whose prompts the round computes. source:
// where its KV comes from, where it is neither here nor computed here; target: where it goes after
// its prefill.
struct WorkRow {
    i32 request = NOBODY, fresh = NOBODY;
    i32 source = NOBODY, target = NOBODY;
    i64 prompt = 0, held = 0, cached = 0;
    i64 decodes = 0, generate = 0, blocks = 0;
    i64 transfer_us = 0;
    // What packing says: whether the KV comes in time, the first step that decodes the row, and its
    // tokens of KV after the last one; 0: none does.
    bool comes = false;
    i64 begin = 0, until = 0;

    bool is_awaited() const { return source != NOBODY; }
    // Its prompt is under way, here or where its KV comes from.
    bool is_started() const { return held > cached && held < prompt; }
    i64 blocks_for(i64 tokens, i64 block_tokens) const {
        return (prompt + tokens + block_tokens - 1) / block_tokens;
    }
};

// The rows of an instance: those it prefills, in rank order, then those it only decodes.
struct Work {
    i32 instance = NOBODY;
    const PlannedInstance *about = nullptr;
    size_t num_prefills = 0;
    i64 blocks = 0; // of all rows
    std::vector<WorkRow> rows;
    // What packing says.
    i64 num_steps = 0;
    bool exceeds_room = false; // in some step
    std::vector<Plan::Chunk> chunks;
};

class Packing {
  public:
    // chunk: tokens of a chunk, 0: whole prompts. limit: the most steps of an instance.
    Packing(Mode mode, i64 chunk, i64 limit);
    ~Packing();

    // The steps of all works; those that prefill come first, for the others await their KV.
    // num_fresh: prompts of the round. is_timed: whether anything depends on when a step ends.
    void pack(const std::vector<Work *> &works, size_t num_fresh, bool is_timed);

  private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

} // namespace sagec
