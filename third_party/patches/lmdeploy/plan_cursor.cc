#include "plan_cursor.h"

#include <algorithm>
#include <unordered_set>

namespace sagec::tm {
namespace {

std::string check_chunks(const sagec_tm_plan &plan) {
    for (int i = 0; i < plan.num_chunks; ++i) {
        const auto where = "chunk " + std::to_string(i) + " of plan " + std::to_string(plan.plan);
        const auto step = plan.chunk_step[i], row = plan.chunk_row[i];
        if (row < 0 || row >= plan.num_rows)
            return where + " is of row " + std::to_string(row) + "; the plan has " +
                   std::to_string(plan.num_rows);
        if (step < (i ? plan.chunk_step[i - 1] : 0) || step >= plan.num_steps)
            return where + " is in step " + std::to_string(step) + "; steps ascend and end before " +
                   std::to_string(plan.num_steps);
        if (plan.chunk_begin[i] < 0 || plan.chunk_end[i] <= plan.chunk_begin[i])
            return where + " is [" + std::to_string(plan.chunk_begin[i]) + ", " +
                   std::to_string(plan.chunk_end[i]) + "); it must have tokens";
    }
    return "";
}

} // namespace

std::string check_plan(const sagec_tm_plan &plan) {
    const auto name = "plan " + std::to_string(plan.plan);
    if (plan.plan < 1)
        return name + ": plans are numbered from 1";
    if (plan.num_steps < 0 || plan.num_rows < 0 || plan.num_chunks < 0 || plan.num_decodes < 0)
        return name + " has a negative number of steps, rows, chunks or decodes";
    std::unordered_set<std::uint64_t> sessions;
    for (int i = 0; i < plan.num_rows; ++i)
        if (!sessions.insert(plan.sessions[i]).second)
            return name + " names session " + std::to_string(plan.sessions[i]) + " in two rows";
    for (int i = 0; i < plan.num_decodes; ++i)
        if (plan.decode_row[i] < 0 || plan.decode_row[i] >= plan.num_rows)
            return "decode " + std::to_string(i) + " of " + name + " is of row " +
                   std::to_string(plan.decode_row[i]) + "; the plan has " + std::to_string(plan.num_rows);
    return check_chunks(plan);
}

PlanCursor::PlanCursor(const sagec_tm_plan &plan)
    : plan_(plan.plan), num_steps_(plan.num_steps), max_step_tokens_(plan.max_step_tokens),
      mixes_phases_(plan.mixes_phases != 0) {
    rows_.reserve(static_cast<std::size_t>(plan.num_rows));
    for (int i = 0; i < plan.num_rows; ++i)
        rows_.push_back({plan.sessions[i], plan.prompt_tokens[i], plan.reused_tokens[i], 0, false, 0, 0});
    chunks_.reserve(static_cast<std::size_t>(plan.num_chunks));
    for (int i = 0; i < plan.num_chunks; ++i) {
        chunks_.push_back({plan.chunk_step[i], plan.chunk_begin[i], plan.chunk_end[i],
                           static_cast<std::size_t>(plan.chunk_row[i])});
        starts_.push_back(plan.chunk_step[i]);
    }
    for (int i = 0; i < plan.num_decodes; ++i) {
        members_.push_back({static_cast<std::size_t>(plan.decode_row[i]), plan.decode_begin_step[i],
                            plan.decode_until_tokens[i]});
        starts_.push_back(plan.decode_begin_step[i]);
    }
    std::sort(starts_.begin(), starts_.end());
    starts_.erase(std::unique(starts_.begin(), starts_.end()), starts_.end());
}

bool PlanCursor::names_absent(const StepView &view) const {
    return std::any_of(rows_.begin(), rows_.end(),
                       [&](const Row &row) { return !view.find_row(row.session); });
}

bool PlanCursor::next(const StepView &view, Decision &decision, std::vector<Gap> &gaps) {
    decision.clear();
    auto later = std::upper_bound(starts_.begin(), starts_.end(), step_);
    for (auto step = step_; step < num_steps_; step = *later++) {
        if (pick(step, view, decision, gaps)) {
            decision.plan = plan_;
            decision.plan_step = step;
            step_ = step + 1;
            return true;
        }
        if (later == starts_.end())
            break;
    }
    return false;
}

bool PlanCursor::pick(std::int64_t step, const StepView &view, Decision &decision, std::vector<Gap> &gaps) {
    ++num_picks_;
    picked_tokens_ = 0;
    auto chunk = std::lower_bound(chunks_.begin(), chunks_.end(), step,
                                  [](const Chunk &one, std::int64_t at) { return one.step < at; });
    for (; chunk != chunks_.end() && chunk->step == step; ++chunk)
        pick_chunk(*chunk, view, decision, gaps);
    if (decision.items.empty() || mixes_phases_)
        pick_decodes(step, view, decision);
    return !decision.items.empty();
}

void PlanCursor::pick_row(Row &row, std::int64_t computed, std::int64_t end, Decision &decision) {
    row.picked_in = num_picks_;
    row.item = decision.items.size();
    decision.items.push_back({row.session, end});
    picked_tokens_ += end - computed;
}

void PlanCursor::pick_chunk(const Chunk &chunk, const StepView &view, Decision &decision,
                            std::vector<Gap> &gaps) {
    auto &row = rows_[chunk.row];
    const auto *here = view.find_row(row.session);
    if (!here || row.is_stalled)
        return;
    const bool goes_on = is_picked(row); // with a chunk of this step that is named already
    const std::int64_t computed = goes_on ? decision.items[row.item].end : here->computed;
    if (computed >= chunk.end)
        return;
    if (stalls(chunk, computed, here->context, gaps)) {
        row.is_stalled = true;
        return;
    }
    row.named_tokens = std::max(row.named_tokens, chunk.end);
    decision.late_tokens += std::max<std::int64_t>(0, chunk.begin - computed);
    if (goes_on) {
        decision.items[row.item].end = chunk.end;
        picked_tokens_ += chunk.end - computed;
    } else {
        pick_row(row, computed, chunk.end, decision);
    }
}

// Tokens that were thought to be cached and are not, are computed with the chunk. Those of a chunk
// that was named and found no room are nobody's mistake: a newer plan goes on with the row.
bool PlanCursor::stalls(const Chunk &chunk, std::int64_t computed, std::int64_t context,
                        std::vector<Gap> &gaps) {
    const auto &row = rows_[chunk.row];
    const bool is_behind = computed < chunk.begin && chunk.begin > row.reused_tokens;
    if (!is_behind && chunk.end <= context)
        return false;
    if (!is_behind || row.named_tokens < chunk.begin)
        gaps.push_back({row.session, chunk.step, chunk.begin, computed});
    return true;
}

// Rows of the batch first, then late ones, while the step's token budget lasts.
void PlanCursor::pick_decodes(std::int64_t step, const StepView &view, Decision &decision) {
    const auto num_chunks = decision.items.size();
    std::size_t num_new = 0;
    for (std::size_t i = 0; i < members_.size() && picked_tokens_ < max_step_tokens_; ++i) {
        const auto &member = members_[i];
        auto &row = rows_[member.row];
        const auto *here = view.find_row(row.session);
        if (!here || is_picked(row) || step < member.begin_step)
            continue;
        const std::int64_t computed = here->computed, context = here->context;
        const auto end = std::min(context, member.until_tokens);
        const bool decodes = computed >= row.prompt_tokens || context - computed == 1;
        if (computed >= end || !decodes)
            continue;
        pick_row(row, computed, computed + std::min(end - computed, max_step_tokens_ - picked_tokens_),
                 decision);
        num_new += i >= num_joined_;
    }
    decision.num_decodes = decision.items.size() - num_chunks;
    if (num_new == 0)
        return;
    const auto joins = [&](const Member &member) {
        const auto &row = rows_[member.row];
        return is_picked(row) && row.item >= num_chunks;
    };
    std::stable_partition(members_.begin() + static_cast<std::ptrdiff_t>(num_joined_), members_.end(), joins);
    num_joined_ += num_new;
}

} // namespace sagec::tm
