// Where every request stands: runtime/state.py (RequestTable) and _Serving of runtime/loop.py.
#include "table.h"

#include <algorithm>

namespace sagec {

void InOrder::insert(i32 number) {
    if (empty() || numbers_.back() < number) {
        numbers_.push_back(number);
        return;
    }
    const auto first = numbers_.begin() + first_;
    const auto at = std::lower_bound(first, numbers_.end(), number);
    if (first_ && at - first < numbers_.end() - at) { // who comes back is among the first
        std::move(first, at, first - 1);
        --first_;
        *(at - 1) = number;
    } else {
        numbers_.insert(at, number);
    }
}

void InOrder::erase(i32 number) {
    const auto first = numbers_.begin() + first_;
    const auto at = std::lower_bound(first, numbers_.end(), number);
    if (at - first > numbers_.end() - at) {
        numbers_.erase(at);
        return;
    }
    std::move_backward(first, at, at + 1);
    ++first_;
    if (2 * first_ > numbers_.size() + 64) {
        numbers_.erase(numbers_.begin(), numbers_.begin() + first_);
        first_ = 0;
    }
}

Table::Table(const std::vector<Request> &requests, std::vector<i64> room_tokens)
    : requests_(requests), room_tokens_(std::move(room_tokens)), rows_(requests.size()) {}

void Table::add(i32 request) {
    const Request &asked = requests_[request];
    rows_[request].remaining_tokens = asked.max_output_tokens;
    wait(request, asked.prompt_tokens);
}

void Table::wait(i32 request, i64 prompt_tokens) {
    enter(request, Phase::waiting);
    Serving &row = rows_[request];
    row.prompt_tokens = prompt_tokens;
    row.computed_tokens = 0;
    row.arriving = false;
}

void Table::note_too_long(i32 request) {
    if (!rows_[request].is_too_long)
        too_long_.insert(request);
    rows_[request].is_too_long = true;
}

void Table::run(i32 request, i32 instance) {
    enter(request, Phase::running);
    rows_[request].instance = rows_[request].decode_on = instance;
}

void Table::leave(i32 request) { enter(request, Phase::leaving); }

void Table::remove(i32 request) { enter(request, Phase::absent); }

void Table::move(i32 request, i32 instance, bool arriving) {
    Serving &row = rows_[request];
    row.instance = row.decode_on = instance;
    row.arriving = arriving;
}

void Table::counted(i32 request, i64 count, i64 first_us, i64 last_us) {
    Serving &row = rows_[request];
    if (!row.output_tokens)
        row.first_token_us = first_us;
    row.computed_tokens = requests_[request].prompt_tokens + row.output_tokens + (count - 1);
    row.output_tokens += count;
    if (row.remaining_tokens != UNBOUNDED)
        row.remaining_tokens -= count;
    row.last_token_us = last_us;
}

i64 Table::remaining_tokens(const Serving &row) const {
    const bool prefills = row.computed_tokens < row.prompt_tokens;
    const i64 held = prefills ? row.prompt_tokens : row.computed_tokens + 1;
    return std::min(row.remaining_tokens, room_tokens_[row.decode_on] - held);
}

void Table::enter(i32 request, Phase phase) {
    const Phase before = rows_[request].phase;
    if (before == phase)
        return;
    if (InOrder *roster_before = roster(before))
        roster_before->erase(request);
    if (InOrder *roster_now = roster(phase))
        roster_now->insert(request);
    rows_[request].phase = phase;
    if (rows_[request].is_too_long) {
        rows_[request].is_too_long = false;
        too_long_.erase(request);
    }
}

InOrder *Table::roster(Phase phase) {
    switch (phase) {
    case Phase::waiting:
        return &waiting_;
    case Phase::running:
        return &running_;
    case Phase::leaving:
        return &leaving_;
    case Phase::absent:
        break;
    }
    return nullptr;
}

} // namespace sagec
