// 0003: each step computes what a plan or an answer says: who, in which order, how many tokens, or nobody.
//
// Hooks SequenceManager::Materialize, TurboMind's scheduler, and CountRequiredBlocks, which it calls.
// Materialize asks back through `adjust` for the step's token budget, when the prefixes of all sequences
// are matched and before blocks are counted; it hands over its own copies of the sequences and of their
// context lengths. There the decision is taken and put into effect: who may compute comes first, and his
// context ends where he may go, so that exactly those tokens are computed and only their blocks are
// allocated. All others need more blocks than there are.
//
// Hooks LlamaBatch::Initialize, because a step that computes nobody would end the process: where there
// are sequences, Initialize insists that one be active. So one pretends to be, and when Initialize has
// taken in the new requests the batch is emptied again: LlamaBatch skips a step that nobody is active in.
// The next step that computes somebody finds them all swapped out and builds the batch anew.
//
// Hooks LlamaBatch::Finish to report what was computed and sampled.
#include "cuda_calls.h"
#include "hooks.h"
#include "instance.h"
#include "step.h"

#include <utility>

namespace sagec::tm {

namespace {

using Signals = std::vector<std::function<void()>>;

Original<void(LlamaBatch *, GenerationState &)> original_initialize;
Original<Outcome(SequenceManager *, Sequences, std::vector<int>, const std::vector<std::uint64_t> &, int,
                 AdjustInputCount)>
    original_materialize;
Original<std::vector<int>(SequenceManager *, const Sequences &, const std::vector<int> &, int)>
    original_count_required_blocks;
Original<void(LlamaBatch *, GenerationState &, Signals &)> original_finish;

// More than any engine has.
constexpr int kUnobtainable = 1 << 28;

// A rank is a thread; its step goes from Materialize to Finish.
Step &this_step() {
    thread_local Step step;
    return step;
}

// The sequence that pretends to be active, in a step that is held.
Sequence *&pretender() {
    thread_local Sequence *sequence = nullptr;
    return sequence;
}

struct Adjusting { // one pointer to it fits into a std::function without memory of its own
    Step &step;
    const std::vector<std::uint64_t> &priorities;
    const AdjustInputCount &adjust;
};

Outcome hold() {
    if (here().batch) {
        pretender() = const_cast<Sequence *>(&this_step().first_sequence());
        pretender()->status = kActive;
    }
    return {0, 0, 0};
}

Outcome materialize(SequenceManager *manager, Sequences sequences, std::vector<int> contexts,
                    const std::vector<std::uint64_t> &priorities, int step_length, AdjustInputCount adjust) {
    Step &step = this_step();
    if (!step.begin(*manager, sequences))
        return original_materialize(manager, std::move(sequences), std::move(contexts), priorities,
                                    step_length, std::move(adjust));
    const Adjusting adjusting{step, priorities, adjust};
    const auto decide = [&adjusting](const Sequences &sorted, const std::vector<int> &lengths) {
        const int budget = adjusting.adjust(sorted, lengths);
        return adjusting.step.decide(const_cast<Sequences &>(sorted), const_cast<std::vector<int> &>(lengths),
                                     adjusting.priorities, budget);
    };
    const Outcome outcome = original_materialize(manager, std::move(sequences), std::move(contexts),
                                                 priorities, step_length, decide);
    return step.activate() ? outcome : hold();
}

// Stock counts the place of the token that the step samples; its KV is the next step's, and so is its
// block in a plan's reckoning.
std::vector<int> count_required_blocks(SequenceManager *manager, const Sequences &sequences,
                                       const std::vector<int> &contexts, int step_length) {
    const Step &step = this_step();
    if (!step.is_decided())
        return original_count_required_blocks(manager, sequences, contexts, step_length);
    auto counts = original_count_required_blocks(manager, sequences, contexts, 0);
    for (auto i = step.num_allowed(); i < counts.size(); ++i)
        counts[i] = kUnobtainable;
    return counts;
}

// Initialize only enqueues copies of host memory, seeds of new requests among it, that the next step writes
// anew. Finish, which waits for them, does not follow: so it is waited here.
void empty_batch(LlamaBatch &batch, GenerationState &generation) {
    if (const auto wait = cuda().stream_synchronize)
        wait(batch.stream);
    pretender()->status = kLocked;
    pretender() = nullptr;
    auto &state = *batch.state;
    if (generation.partial)
        state.h_context_length.as<int>()[state.active_size - 1] = generation.partial_context_length;
    generation.partial = 0;
    generation.unique_ids.clear();
    state.active_size = 0;
}

void initialize(LlamaBatch *batch, GenerationState &generation) {
    Place &place = here();
    place.batch = batch;
    place.rank = batch->tp_rank;
    original_initialize(batch, generation);
    if (pretender())
        empty_batch(*batch, generation);
}

void finish(LlamaBatch *batch, GenerationState &generation, Signals &signals) {
    Step &step = this_step();
    if (!step.is_reported() || batch->state->active_size == 0)
        return original_finish(batch, generation, signals);
    step.collect(*batch, generation);
    original_finish(batch, generation, signals);
    step.report(*batch);
}

} // namespace

std::vector<Hook> scheduler_hooks() {
    return {
        {names::kInitialize, reinterpret_cast<void *>(initialize), original_initialize.slot()},
        {names::kMaterialize, reinterpret_cast<void *>(materialize), original_materialize.slot()},
        {names::kCountRequiredBlocks, reinterpret_cast<void *>(count_required_blocks),
         original_count_required_blocks.slot()},
        {names::kFinish, reinterpret_cast<void *>(finish), original_finish.slot()},
    };
}

} // namespace sagec::tm
