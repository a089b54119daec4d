// A step of one rank: who could compute in it, what was decided, and what came of it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "abi.h"
#include "decision.h"
#include "instance.h"
#include "rank_board.h"

namespace sagec::tm {

// Kept from step to step, for its vectors' memory and for what it remembers of the step before. The
// calls come in this order, on the rank's thread: begin, decide, activate, and where somebody computes
// collect and report.
class Step {
  public:
    // TurboMind schedules `sequences`. False: nobody of ours among them, the step is its own business.
    bool begin(SequenceManager &manager, const Sequences &sequences);

    // Everybody's prefix is matched, sequences are in stock's order, `budget` is what the engine takes.
    // Waits for the decision and puts it into effect: order, and as context lengths how far each one may
    // go. Returns the budget that goes with them.
    int decide(Sequences &sequences, std::vector<int> &contexts, const std::vector<std::uint64_t> &priorities,
               int budget);

    // Is the step decided, by a plan or an answer? Then the first num_allowed() sequences may compute, as
    // far as their context says, and nobody else.
    bool is_decided() const { return is_underway_ && !decision_.is_stock(); }
    std::size_t num_allowed() const { return order_.size(); }

    // Blocks are allocated. False: nobody computes, and the step is over; an engine holds it (see 0003).
    bool activate();

    // The step was computed; before its results go out, for then those who finished are gone.
    void collect(const LlamaBatch &batch, const GenerationState &generation);
    // Its results are out, and still there to be read.
    void report(const LlamaBatch &batch);

    bool is_reported() const { return is_ours_ && instance_ && rank_ == 0; } // rank 0 speaks for all
    const Sequence &first_sequence() const { return *sequences_.front(); }

  private:
    struct Seen { // a row, and how much of it should be computed when it is seen next
        std::uint64_t priority, session;
        int computed;
    };
    struct Computed {
        const sagec_tm_row *row;
        int begin, end;
        bool is_sampled;
        const int *tokens;
    };

    void join_ranks(const LlamaBatch &batch);
    void enter(std::shared_ptr<Instance> instance);
    void lock_blocks();
    void look_at(const Sequences &sequences, const std::vector<int> &contexts,
                 const std::vector<std::uint64_t> &priorities);
    void tell_preempted();
    void get_decision();
    void allot(int budget);
    void allot_items(bool one_must);
    void allot_row(std::size_t index, int end);
    void allot_rest();
    int missing_blocks(std::size_t index, int end) const; // to have a row's first `end` tokens
    void put_first(Sequences &sequences, std::vector<int> &contexts) const;
    void remember();
    void write_row(const sagec_tm_row &row, int begin, int end, int token, int flags);
    void begin_report();
    void end_report();

    std::shared_ptr<Instance> instance_;
    std::shared_ptr<RankBoard> board_;
    SequenceManager *manager_ = nullptr;
    std::unique_lock<std::mutex> blocks_lock_;
    std::int64_t num_asked_ = 0, begin_us_ = 0;
    int rank_ = 0, num_ranks_ = 1;
    bool is_ours_ = false, is_underway_ = false; // underway: TurboMind schedules it

    StepView view_;
    Decision decision_;
    Sequences sequences_; // of view_.rows
    std::vector<std::uint64_t> sorted_priorities_;
    std::vector<Seen> seen_;

    // By row: the end that was planned, the end that is allowed; 0: none.
    std::vector<int> planned_, allowed_;
    std::vector<std::size_t> order_; // rows that are allowed something, as decided
    int left_tokens_ = 0, left_blocks_ = 0;
    bool has_partial_ = false;

    // The report: who was computed, and the fields of the event's rows.
    std::vector<Computed> computed_;
    std::vector<std::int64_t> fields_;
    std::vector<bool> is_written_;
    std::int64_t num_rows_ = 0, num_missed_ = 0, num_unplanned_ = 0;
};

} // namespace sagec::tm
