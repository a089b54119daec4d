// A plan under way: which tokens of which sessions the next step computes.
//
// The rules are those of sagec's runtime/cursor.py, and tests hold the two against each other. What
// differs: room is TurboMind's to give, so a row is named whether it will find room or not (step.cc lets
// one that decodes wait for it), and is asked for again in the next step that names it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "decision.h"

namespace sagec::tm {

// A chunk that begins behind tokens that nobody computed, or ends behind the session's tokens: it and
// the later chunks of its session were left out.
struct Gap {
    std::uint64_t session;
    std::int64_t plan_step, begin, computed;
};

// "" or why the columns do not hold together.
std::string check_plan(const sagec_tm_plan &plan);

class PlanCursor {
  public:
    explicit PlanCursor(const sagec_tm_plan &plan); // checked; copies its columns

    std::int64_t plan() const { return plan_; }
    bool is_done() const { return step_ >= num_steps_; } // all its steps have gone by

    bool names_absent(const StepView &view) const; // somebody who is not there

    // Whom the next step that has anything to do computes, as items and plan_step of `decision`; the
    // cursor goes behind that step. False: there is none for those who are there; then it stays where
    // it is, for others may still come.
    bool next(const StepView &view, Decision &decision, std::vector<Gap> &gaps);

  private:
    struct Row {
        std::uint64_t session;
        std::int64_t prompt_tokens, reused_tokens;
        std::int64_t named_tokens; // how far the chunks that were named would have brought it
        bool is_stalled;           // a chunk was left out: the later ones have nothing to stand on
        std::uint64_t picked_in;   // the number of the pick that named it last, and which item it is
        std::size_t item;
    };
    struct Chunk {
        std::int64_t step, begin, end;
        std::size_t row;
    };
    struct Member { // of the batch that decodes
        std::size_t row;
        std::int64_t begin_step, until_tokens;
    };

    bool pick(std::int64_t step, const StepView &view, Decision &decision, std::vector<Gap> &gaps);
    void pick_chunk(const Chunk &chunk, const StepView &view, Decision &decision, std::vector<Gap> &gaps);
    void pick_decodes(std::int64_t step, const StepView &view, Decision &decision);
    void pick_row(Row &row, std::int64_t computed, std::int64_t end, Decision &decision);
    bool is_picked(const Row &row) const { return row.picked_in == num_picks_; }
    bool stalls(const Chunk &chunk, std::int64_t computed, std::int64_t context, std::vector<Gap> &gaps);

    std::int64_t plan_ = 0, num_steps_ = 0, max_step_tokens_ = 0, step_ = 0;
    bool mixes_phases_ = true;
    std::vector<Row> rows_;
    std::vector<Chunk> chunks_;        // by step
    std::vector<Member> members_;      // those that joined come first, in the order in which they did
    std::vector<std::int64_t> starts_; // the steps in which something begins, ascending
    std::size_t num_joined_ = 0;
    std::uint64_t num_picks_ = 0;
    std::int64_t picked_tokens_ = 0; // in the pick under way
};

} // namespace sagec::tm
