// Where every request stands: runtime/state.py (RequestTable) and _Serving of runtime/loop.py.
#pragma once

#include <vector>

#include "types.h"

namespace sagec {

enum class Phase : i32 { absent, waiting, running, leaving };

constexpr i64 NEVER = INT64_MIN; // no time

// What came of a request that ended; served: all its tokens came.
enum class Ending : i32 { served, refused, too_long };

// A request. prompt_tokens: to compute before the next one can be sampled. known_on: the instance
// that knows it, with the first `base` tokens of its output as part of its prompt. shadow_on: one
// that still knows what it was before, or awaits its KV.
struct Serving {
    Phase phase = Phase::absent;
    i32 instance = 0, decode_on = 0;
    i32 known_on = NOBODY, shadow_on = NOBODY;
    bool arriving = false;
    bool is_too_long = false; // waits, and no instance ever holds it
    i64 prompt_tokens = 0, computed_tokens = 0, remaining_tokens = 0;
    i64 output_tokens = 0, base = 0, reused_tokens = 0, preemptions = 0;
    i64 admitted_us = NEVER, first_token_us = NEVER, last_token_us = NEVER;
    std::vector<i32> ran_on;
};

// Numbers in ascending order, of which mostly the first leave and the last come.
class InOrder {
  public:
    const i32 *begin() const { return numbers_.data() + first_; }
    const i32 *end() const { return numbers_.data() + numbers_.size(); }
    i64 size() const { return static_cast<i64>(numbers_.size() - first_); }
    bool empty() const { return first_ == numbers_.size(); }
    void insert(i32 number);
    void erase(i32 number);

  private:
    std::vector<i32> numbers_;
    std::size_t first_ = 0;
};

// All requests of a run by number, which is the order in which they come.
class Table {
  public:
    Table(const std::vector<Request> &requests, std::vector<i64> room_tokens);

    Serving &operator[](i32 request) { return rows_[request]; }
    const Serving &operator[](i32 request) const { return rows_[request]; }
    const Request &asked(i32 request) const { return requests_[request]; }

    void add(i32 request);
    void wait(i32 request, i64 prompt_tokens);
    // Who waits will never fit.
    void note_too_long(i32 request);
    void run(i32 request, i32 instance);
    void leave(i32 request);
    void remove(i32 request);
    void move(i32 request, i32 instance, bool arriving);
    // `count` more tokens were sampled, the first and the last of them at these times.
    void counted(i32 request, i64 count, i64 first_us, i64 last_us);
    // How many may still be generated; no more than there is room for where it decodes.
    i64 remaining_tokens(const Serving &row) const;

    const InOrder &waiting() const { return waiting_; }
    const InOrder &too_long() const { return too_long_; }
    const InOrder &running() const { return running_; }
    const InOrder &leaving() const { return leaving_; }
    bool is_anybody() const { return !(waiting_.empty() && running_.empty()); }
    i64 num_live() const { return waiting_.size() + running_.size() + leaving_.size(); }

  private:
    void enter(i32 request, Phase phase);
    InOrder *roster(Phase phase);

    const std::vector<Request> &requests_;
    std::vector<i64> room_tokens_;
    std::vector<Serving> rows_;
    InOrder waiting_, too_long_, running_, leaving_;
};

} // namespace sagec
