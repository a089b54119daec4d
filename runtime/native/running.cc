// What a simulated instance computes next; see runtime/engines/sim/running.py.
#include "running.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace sagec {

namespace {

double pairs_of(i64 begin, i64 end) { return static_cast<double>(end * (end + 1) - begin * (begin + 1)) / 2; }

i64 whole_us(double us) { return std::max<i64>(1, std::llrint(us)); }

// When each of so many like steps ends.
void time_steps(i64 steps, const StepCost &cost, Stretch &stretch) {
    const i64 decodes = static_cast<i64>(stretch.decodes.size());
    i64 tokens = decodes, context = 0;
    double pairs = 0;
    for (const Computed &chunk : stretch.chunks) {
        tokens += chunk.end - chunk.begin;
        pairs += pairs_of(chunk.begin, chunk.end);
    }
    for (const Row *row : stretch.decodes)
        context += row->num_tokens;
    i64 end_us = stretch.begin_us;
    for (i64 i = 0; i < steps; ++i, context += decodes) {
        end_us += whole_us(cost.step_us(tokens, pairs + context, context, decodes));
        stretch.ends_us.push_back(end_us);
    }
}

} // namespace

// ---- Stretch

std::optional<i64> Stretch::end_of_step_at(i64 now_us) const {
    const auto at = std::lower_bound(ends_us.begin(), ends_us.end(), now_us);
    return at == ends_us.end() ? std::nullopt : std::optional<i64>(*at);
}

std::size_t Stretch::over_by(i64 now_us) const {
    return std::upper_bound(ends_us.begin() + done, ends_us.end(), now_us) - ends_us.begin() - done;
}

void Stretch::end_with_the_step_at(i64 now_us) {
    const auto at = std::lower_bound(ends_us.begin(), ends_us.end(), now_us) - ends_us.begin();
    const std::size_t left = std::max<std::size_t>(done, at + 1);
    ends_us.resize(std::min(left, ends_us.size()));
    if (told_until_us() >= now_us)
        ends_us.resize(done);
}

// ---- RunningPlan

void RunningPlan::begin(Plan plan) {
    plan_ = std::move(plan);
    step = 0;
    exports = plan_.exports;
    starts_.clear();
    for (const Plan::Chunk &chunk : plan_.chunks)
        if (starts_.empty() || starts_.back() != chunk.step)
            starts_.push_back(chunk.step);
    for (const Plan::Decode &decode : plan_.decodes)
        if (starts_.empty() || starts_.back() != decode.begin_step)
            starts_.push_back(decode.begin_step);
    std::sort(starts_.begin(), starts_.end());
    starts_.erase(std::unique(starts_.begin(), starts_.end()), starts_.end());
}

bool RunningPlan::next_stretch(Residents &residents, const StepCost &cost, i64 now_us, Stretch &stretch) {
    const i64 from = step;
    std::size_t later = first_start_after(from);
    for (i64 at = from; at < plan_.num_steps; at = starts_[later++]) {
        step = at;
        if (const i64 steps = fill(residents, stretch)) {
            stretch.begin_us = now_us;
            time_steps(steps, cost, stretch);
            if (stretch.chunks.size() == 1 && plan_.decodes.empty())
                prolong(residents, cost, stretch);
            return true;
        }
        if (later == starts_.size())
            break;
    }
    return false;
}

// Who computes from this step on; for how many steps, 0 where nobody does.
i64 RunningPlan::fill(Residents &residents, Stretch &stretch) const {
    stretch.first = step;
    stretch.done = 0;
    stretch.chunks.clear();
    stretch.decodes.clear();
    stretch.ends_us.clear();
    stretch.reached.clear();
    add_chunks(residents, stretch);
    i64 tokens = 0;
    for (const Computed &chunk : stretch.chunks)
        tokens += chunk.end - chunk.begin;
    i64 steps = stretch.chunks.empty() ? until_change() : 1;
    if (stretch.chunks.empty() || plan_.mixes_phases)
        steps = add_decodes(tokens, steps, residents, stretch);
    return stretch.chunks.empty() && stretch.decodes.empty() ? 0 : steps;
}

std::size_t RunningPlan::first_start_after(i64 at) const {
    return std::upper_bound(starts_.begin(), starts_.end(), at) - starts_.begin();
}

// Steps from this one on until chunks or rows of the batch change, as the plan says.
i64 RunningPlan::until_change() const {
    const std::size_t later = first_start_after(step);
    const i64 change = later < starts_.size() ? starts_[later] : plan_.num_steps;
    return std::min<i64>(change, plan_.num_steps) - step;
}

std::size_t RunningPlan::first_chunk_of(i64 at) const {
    const auto is_before = [](const Plan::Chunk &chunk, i64 of) { return chunk.step < of; };
    const auto &all = plan_.chunks;
    return std::lower_bound(all.begin(), all.end(), at, is_before) - all.begin();
}

// The step's chunks, less what is computed already; and with what the prefix cache was thought to
// have and has not.
void RunningPlan::add_chunks(Residents &residents, Stretch &stretch) const {
    for (std::size_t i = first_chunk_of(step); i < plan_.chunks.size(); ++i) {
        const Plan::Chunk &chunk = plan_.chunks[i];
        if (chunk.step != step)
            break;
        Row *row = residents.find(request(chunk.row));
        if (!row || chunk.end > row->num_tokens)
            continue;
        residents.begin(*row);
        if (row->computed < chunk.end && residents.make_room(*row, chunk.end, reserved(chunk.row)))
            stretch.chunks.push_back({row, row->computed, chunk.end, chunk.row});
    }
}

// Rows that decode from this step on; for how many steps all of them do.
i64 RunningPlan::add_decodes(i64 tokens, i64 most, Residents &residents, Stretch &stretch) const {
    const i64 budget = plan_.max_step_tokens - tokens;
    i64 steps = most;
    for (const Plan::Decode &decode : plan_.decodes) {
        if (static_cast<i64>(stretch.decodes.size()) >= budget)
            break;
        if (decode.begin_step > step)
            continue;
        Row *row = residents.find(request(decode.row));
        if (!row || !row->decodes() || row->computed >= decode.until_tokens)
            continue;
        const i64 its_steps = steps_with_room(decode, *row, most, residents);
        if (its_steps < 1)
            continue;
        steps = std::min(steps, its_steps);
        stretch.decodes.push_back(row);
    }
    return steps;
}

// For how many steps the row may decode, of which it has room for one at least; 0: it has none.
i64 RunningPlan::steps_with_room(const Plan::Decode &decode, Row &row, i64 most, Residents &residents) const {
    i64 end = std::min(row.computed + most, decode.until_tokens);
    if (end >= row.limit)
        end = row.limit - 1;
    if (row.blocks * residents.block_tokens >= end)
        return end - row.computed;
    if (residents.make_room(row, end, reserved(decode.row)))
        return end - row.computed;
    return residents.make_room(row, row.computed + 1, reserved(decode.row)) ? 1 : 0;
}

// Let a lone prompt's chunk be followed by the next ones, up to the one that samples. Nothing else
// happens then, for nobody decodes here.
void RunningPlan::prolong(Residents &residents, const StepCost &cost, Stretch &stretch) const {
    const Computed first = stretch.chunks[0];
    i64 end = first.end;
    stretch.reached.push_back(end);
    for (i64 at = stretch.first + 1; at < plan_.num_steps; ++at) {
        const std::size_t next = first_chunk_of(at);
        const bool is_lone = next + 1 == plan_.chunks.size() ||
                             (next < plan_.chunks.size() && plan_.chunks[next + 1].step != at);
        if (!is_lone || plan_.chunks[next].step != at || plan_.chunks[next].row != first.plan_row)
            break;
        const i64 begin = std::exchange(end, plan_.chunks[next].end);
        if (begin >= end || end >= first.row->num_tokens ||
            !residents.make_room(*first.row, end, reserved(first.plan_row)))
            break;
        const double us = cost.step_us(end - begin, pairs_of(begin, end), 0, 0);
        stretch.ends_us.push_back(stretch.ends_us.back() + whole_us(us));
        stretch.reached.push_back(end);
    }
    if (stretch.reached.size() == 1)
        stretch.reached.clear();
}

} // namespace sagec
