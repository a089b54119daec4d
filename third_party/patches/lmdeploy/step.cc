#include "step.h"

#include <algorithm>
#include <utility>

#include "device_copy.h"
#include "hand_over.h"

namespace sagec::tm {

// ---- before

bool Step::begin(SequenceManager &manager, const Sequences &sequences) {
    const Place &place = here();
    is_ours_ = false;
    rank_ = place.batch ? place.batch->tp_rank : 0;
    num_ranks_ = place.batch ? place.batch->tp_size : 1;
    const auto number = number_of(sequences);
    if (number == 0) {
        if (sequences.empty() && instance_)
            instance_->rest();
        seen_.clear();
        return false;
    }
    manager_ = &manager;
    if (!instance_ || instance_->number != number || instance_->is_closed() || place.manager != &manager)
        enter(instance_numbered(number));
    if (num_ranks_ > 1 && !board_)
        join_ranks(*place.batch);
    if (!instance_ && !board_)
        return false;
    lock_blocks();
    decision_.clear();
    order_.clear();
    computed_.clear();
    is_ours_ = is_underway_ = true;
    return true;
}

void Step::join_ranks(const LlamaBatch &batch) {
    board_ = board_of(batch);
    prepare_copies();
    board_->meet(num_ranks_);
}

void Step::enter(std::shared_ptr<Instance> instance) {
    Place &place = here();
    if (instance_ && place.manager)
        instance_->remove_manager(*place.manager);
    place.instance = instance_ = std::move(instance);
    place.manager = manager_;
    seen_.clear();
    if (instance_)
        instance_->add_manager(*manager_);
}

void Step::lock_blocks() {
    if (instance_)
        blocks_lock_ = std::unique_lock(instance_->blocks_mutex(manager_->rank));
}

int Step::decide(Sequences &sequences, std::vector<int> &contexts,
                 const std::vector<std::uint64_t> &priorities, int budget) {
    sequences_ = sequences;
    look_at(sequences, contexts, priorities);
    view_.budget_tokens = budget;
    if (is_reported())
        tell_preempted();
    get_decision();
    allot(budget);
    if (!is_decided())
        return budget;
    put_first(sequences, contexts);
    return budget - left_tokens_;
}

// In stock's order a row's priority is the least that none before it has.
void Step::look_at(const Sequences &sequences, const std::vector<int> &contexts,
                   const std::vector<std::uint64_t> &priorities) {
    sorted_priorities_ = priorities;
    std::sort(sorted_priorities_.begin(), sorted_priorities_.end());
    const auto &blocks = *manager_->block_manager;
    view_.free_blocks = num_free_blocks(blocks);
    view_.cached_blocks = static_cast<int>(blocks.cached.size());
    view_.rows.resize(sequences.size());
    for (std::size_t i = 0; i < sequences.size(); ++i) {
        const auto &sequence = *sequences[i];
        view_.rows[i] = {sequence.id,        sorted_priorities_[i], contexts[i],
                         sequence.cache_len, sequence.status,       0};
    }
    view_.index_rows();
}

// Both the rows of this step and those seen before are in the order of their priorities.
void Step::tell_preempted() {
    auto before = seen_.begin();
    for (const auto &row : view_.rows) {
        while (before != seen_.end() && before->priority < row.priority)
            ++before;
        if (before == seen_.end())
            return;
        if (before->session != row.session || row.computed >= before->computed)
            continue;
        instance_->count(&sagec_tm_counters::preemptions);
        instance_->events.write(SAGEC_TM_PREEMPTED,
                                {static_cast<std::int64_t>(row.session), before->computed, row.computed});
    }
}

// While nobody knows what to compute, others may look at the blocks.
void Step::get_decision() {
    blocks_lock_ = {};
    if (board_ && rank_ != 0) {
        std::shared_ptr<Instance> instance;
        board_->take(++num_asked_, instance, decision_);
        if (instance != instance_)
            enter(instance);
    } else {
        if (instance_)
            instance_->decide(view_, decision_);
        if (board_)
            board_->post(instance_, decision_, num_ranks_);
    }
    lock_blocks();
}

// ---- the decision, put into effect

void Step::allot(int budget) {
    planned_.assign(view_.rows.size(), 0);
    allowed_.assign(view_.rows.size(), 0);
    left_tokens_ = budget;
    left_blocks_ = view_.free_blocks + view_.cached_blocks;
    has_partial_ = false;
    if (!is_decided())
        return;
    allot_items(false);
    if (order_.empty())
        allot_items(true);
    if (!instance_->options.strict && !decision_.holds())
        allot_rest();
}

// Who decodes by a plan and finds no room waits, and is not planned, as long as anybody goes on: TurboMind
// would take the room from another, whose KV is then to be computed again. one_must: the first one goes.
void Step::allot_items(bool one_must) {
    const auto num_chunks = decision_.items.size() - decision_.num_decodes;
    auto late_tokens = decision_.late_tokens;
    for (std::size_t i = 0; i < decision_.items.size(); ++i) {
        const auto *row = view_.find_row(decision_.items[i].session);
        if (!row)
            continue;
        const auto index = view_.index_of(*row);
        int end = static_cast<int>(std::clamp<std::int64_t>(decision_.items[i].end, 0, row->context));
        const bool waits = i >= num_chunks && missing_blocks(index, end) > std::max(left_blocks_, 0);
        if (waits && !(one_must && order_.empty()))
            continue;
        // tokens that the plan took for cached may use up the budget of those that it knew of
        const auto beyond = std::clamp<std::int64_t>(end - row->computed - left_tokens_, 0, late_tokens);
        late_tokens -= beyond;
        end -= static_cast<int>(beyond);
        planned_[index] = beyond > 0 && end <= row->computed ? 0 : end;
        allot_row(index, end);
    }
}

int Step::missing_blocks(std::size_t index, int end) const {
    const int ranks = manager_->attn_cp_size, block_tokens = manager_->block_seq_len;
    const int tokens = (end + ranks - 1) / ranks;
    const int blocks = (tokens + block_tokens - 1) / block_tokens;
    return std::max(0, blocks - static_cast<int>(sequences_[index]->blocks.size()));
}

// TurboMind takes one sequence a step that does not finish its context: a second one is left out. So is
// who finds the budget used up.
void Step::allot_row(std::size_t index, int end) {
    const auto &row = view_.rows[index];
    end = std::min(end, row.computed + left_tokens_);
    const bool is_partial = end < row.context;
    if (end <= row.computed || allowed_[index] != 0 || (is_partial && has_partial_))
        return;
    allowed_[index] = end;
    order_.push_back(index);
    left_tokens_ -= end - row.computed;
    left_blocks_ -= missing_blocks(index, end);
    has_partial_ |= is_partial;
}

// Those that are not named: whole ones first, then one that takes what is left.
void Step::allot_rest() {
    for (std::size_t i = 0; i < view_.rows.size(); ++i)
        if (planned_[i] == 0 && view_.rows[i].context - view_.rows[i].computed <= left_tokens_)
            allot_row(i, view_.rows[i].context);
    for (std::size_t i = 0; i < view_.rows.size() && left_tokens_ > 0 && !has_partial_; ++i)
        if (planned_[i] == 0)
            allot_row(i, view_.rows[i].context);
}

// Those that may compute come first, as decided, and their contexts end where they may go; the others
// follow in stock's order, so that the last of them loses its blocks first where there are too few.
void Step::put_first(Sequences &sequences, std::vector<int> &contexts) const {
    std::size_t place = 0;
    for (const auto index : order_) {
        sequences[place] = sequences_[index];
        contexts[place++] = allowed_[index];
    }
    for (std::size_t i = 0; i < view_.rows.size(); ++i)
        if (allowed_[i] == 0) {
            sequences[place] = sequences_[i];
            contexts[place++] = view_.rows[i].context;
        }
}

// ---- after

bool Step::activate() {
    is_underway_ = false;
    const bool is_active = std::any_of(sequences_.begin(), sequences_.end(),
                                       [](const Sequence *sequence) { return sequence->status == kActive; });
    if (is_reported()) {
        remember();
        begin_us_ = now_us();
    }
    blocks_lock_ = {};
    if (is_active || !instance_)
        return true;
    if (is_reported() && !decision_.items.empty()) { // nobody of those who were named found room
        begin_report();
        end_report(); // which counts it as held
    } else if (is_reported()) {
        instance_->count(&sagec_tm_counters::held_steps);
        if (decision_.is_stock())
            instance_->pause();
    }
    return false;
}

// What should be computed of each row when the next step begins.
void Step::remember() {
    seen_.resize(view_.rows.size());
    for (std::size_t i = 0; i < view_.rows.size(); ++i) {
        const auto &row = view_.rows[i];
        const auto &sequence = *sequences_[i];
        const int coming = sequence.status == kActive ? sequence.input_length : 0;
        seen_[i] = {row.priority, row.session, sequence.cache_len + coming};
    }
}

void Step::collect(const LlamaBatch &batch, const GenerationState &generation) {
    const auto &state = *batch.state;
    for (int i = 0; i < state.active_size; ++i) {
        const auto &sequence = *state.sequences[i];
        const auto *row = view_.find_row(sequence.id);
        const int end = sequence.cache_len;
        computed_.push_back({row, end - sequence.input_length, end,
                             i < state.active_size - generation.partial,
                             state.requests[i]->output_ids.buffer.as<int>()});
    }
}

void Step::report(const LlamaBatch &batch) {
    begin_report();
    for (std::size_t i = 0; i < computed_.size(); ++i) {
        const auto &one = computed_[i];
        const bool has_finished = !batch.state->requests[i];
        write_row(*one.row, one.begin, one.end, one.is_sampled ? one.tokens[one.end] : 0,
                  (one.is_sampled ? SAGEC_TM_ROW_SAMPLED : 0) | (has_finished ? SAGEC_TM_ROW_FINISHED : 0));
    }
    end_report();
}

void Step::begin_report() {
    fields_.clear();
    num_rows_ = num_missed_ = num_unplanned_ = 0;
    is_written_.assign(view_.rows.size(), false);
}

void Step::write_row(const sagec_tm_row &row, int begin, int end, int token, int flags) {
    const auto index = view_.index_of(row);
    fields_.insert(fields_.end(),
                   {static_cast<std::int64_t>(row.session), begin, end, planned_[index], token, flags});
    is_written_[index] = true;
    ++num_rows_;
    num_missed_ += end < planned_[index];
    num_unplanned_ += planned_[index] == 0 && !decision_.is_stock();
}

// Those who were planned and not computed come last.
void Step::end_report() {
    for (std::size_t i = 0; i < view_.rows.size(); ++i)
        if (planned_[i] != 0 && !is_written_[i])
            write_row(view_.rows[i], view_.rows[i].computed, view_.rows[i].computed, 0, 0);
    const auto &blocks = *manager_->block_manager;
    instance_->events.write(SAGEC_TM_STEP,
                            {decision_.step, decision_.plan, decision_.plan_step, decision_.decided_by,
                             begin_us_, now_us(), static_cast<std::int64_t>(blocks.active.size()),
                             static_cast<std::int64_t>(blocks.cached.size()), num_free_blocks(blocks),
                             num_rows_},
                            fields_);
    {
        std::lock_guard lock(instance_->counters_mutex);
        auto &counters = instance_->counters;
        ++(computed_.empty() ? counters.held_steps : counters.steps);
        counters.fallbacks += decision_.decided_by == SAGEC_TM_BY_DEADLINE;
        counters.missed_rows += num_missed_;
        counters.unplanned_rows += num_unplanned_;
    }
    instance_->end_step();
}

} // namespace sagec::tm
