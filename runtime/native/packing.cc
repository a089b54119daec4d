// The steps of each instance, packed one after the other: runtime/direct/packing.py. Times and what
// is only an estimate there are computed where steps depend on them, and nowhere else.
#include "packing.h"

#include <algorithm>
#include <limits>

namespace sagec {
namespace {

constexpr double NEVER = std::numeric_limits<double>::infinity();
constexpr i64 NOT_JOINED = i64(1) << 40;
constexpr i64 TURN = 4; // steps of decodes after one of prompts, in time-share mode

struct Order {
    Mode mode;
    i64 chunk, limit;
    bool is_timed;
};

// Of each prompt of the round, when it is computed, in microseconds after the steps begin; NEVER:
// not within them.
using Finished = std::vector<double>;

struct Arrival {
    double us;
    size_t row;
};

// How many rows, their tokens of KV and their blocks.
struct Tally {
    i64 rows = 0, context = 0, blocks = 0;
};

double pairs_of(i64 begin, i64 end) { // a token attends to itself and to those before it
    return double(end * (end + 1) - begin * (begin + 1)) / 2;
}

i64 seats_of(const PlannedInstance &one) { return std::min(one.max_batch, one.max_step_tokens); }

// Whether the row's KV is on its way, or is computed elsewhere within the horizon.
bool will_come(const Work &work, const WorkRow &row, const Finished &finished) {
    return row.source == work.instance || finished[row.fresh] < NEVER;
}

// Marks the rows whose KV comes; `arrivals`: those of them that decode here, as they arrive.
void find_coming(Work &work, const Finished &finished, std::vector<Arrival> &arrivals) {
    arrivals.clear();
    for (size_t at = work.num_prefills; at < work.rows.size(); ++at) {
        auto &row = work.rows[at];
        row.comes = row.is_awaited() && will_come(work, row, finished);
        if (!row.comes || row.decodes <= 0)
            continue;
        const double ready = row.fresh == NOBODY ? 0.0 : finished[row.fresh];
        arrivals.push_back({ready + double(row.transfer_us), at});
    }
    const auto is_sooner = [](const Arrival &a, const Arrival &b) { return a.us < b.us; };
    if (!std::is_sorted(arrivals.begin(), arrivals.end(), is_sooner))
        std::stable_sort(arrivals.begin(), arrivals.end(), is_sooner);
}

// Prompts alone

// Prompts one behind the other make a line of tokens, which the budget cuts into steps; those under
// way are first. False where a step would have more rows than an engine takes.
bool cut_line(Work &work, i64 limit) {
    const i64 budget = work.about->max_step_tokens;
    i64 step = 0, left = budget, rows = 0;
    for (const bool started : {true, false})
        for (size_t at = 0; at < work.rows.size(); ++at) {
            const auto &row = work.rows[at];
            if (row.is_started() != started)
                continue;
            for (i64 begin = row.held; begin < row.prompt && step < limit;) {
                const i64 end = std::min(row.prompt, begin + left);
                work.chunks.push_back({i32(step), i32(at), begin, end});
                if (++rows > work.about->max_batch)
                    return false;
                left -= end - begin;
                begin = end;
                if (left == 0) {
                    ++step;
                    left = budget;
                    rows = 0;
                }
            }
        }
    return true;
}

void time_line(const Work &work, Finished &finished) {
    double now_us = 0.0;
    const auto &chunks = work.chunks;
    for (size_t begin = 0, end; begin < chunks.size(); begin = end) {
        i64 tokens = 0;
        double pairs = 0.0;
        for (end = begin; end < chunks.size() && chunks[end].step == chunks[begin].step; ++end) {
            tokens += chunks[end].end - chunks[end].begin;
            pairs += pairs_of(chunks[end].begin, chunks[end].end);
        }
        now_us += work.about->cost.step_us(double(tokens), pairs, 0.0, 0.0);
        for (size_t i = begin; i < end; ++i)
            if (const auto &row = work.rows[chunks[i].row]; chunks[i].end == row.prompt)
                finished[row.fresh] = now_us;
    }
}

// The steps of an instance that only prefills, where no prompt waits for blocks or has bounds.
// False where that is not all.
bool line(Work &work, const Order &order, Finished &finished) {
    if (work.about->max_partial_prefills || work.blocks > work.about->kv_blocks)
        return false;
    for (const auto &row : work.rows)
        if (row.decodes || (order.chunk && row.prompt - row.held > order.chunk))
            return false;
    if (!cut_line(work, order.limit)) {
        work.chunks.clear();
        return false;
    }
    work.num_steps = work.chunks.back().step + 1;
    if (order.is_timed)
        time_line(work, finished);
    return true;
}

// Decodes alone

class DecodesOnly {
  public:
    // False where there is not place and KV for all at once.
    bool pack(Work &work, const Order &order, const Finished &finished);

  private:
    i64 steps_alone(const Work &work, i64 limit) const;
    i64 steps_with_arrivals(const Work &work, i64 alone, i64 limit);
    void count_alone(const Work &work, i64 steps);

    std::vector<Arrival> arrivals_;
    std::vector<Tally> alone_;  // of each step, who is there beside those who arrive
    std::vector<Tally> leaves_; // by step, which of those who arrived are done
};

bool DecodesOnly::pack(Work &work, const Order &order, const Finished &finished) {
    if (i64(work.rows.size()) > seats_of(*work.about) || work.blocks > work.about->kv_blocks)
        return false;
    find_coming(work, finished, arrivals_);
    i64 steps = steps_alone(work, order.limit);
    if (order.is_timed && !arrivals_.empty())
        steps = steps_with_arrivals(work, steps, order.limit);
    else // all are there from the first step on
        for (const auto &arrival : arrivals_)
            steps = std::max(steps, std::min(order.limit, work.rows[arrival.row].decodes));
    work.num_steps = steps;
    for (auto &row : work.rows) {
        const i64 here = row.is_awaited() ? 0 : std::min(row.decodes, steps);
        const i64 taken = row.comes ? row.decodes : here;
        row.until = taken > 0 ? row.prompt + taken : 0;
    }
    return true;
}

i64 DecodesOnly::steps_alone(const Work &work, i64 limit) const {
    i64 steps = 0;
    for (const auto &row : work.rows)
        if (!row.is_awaited())
            steps = std::max(steps, row.decodes);
    return std::min(steps, limit);
}

void DecodesOnly::count_alone(const Work &work, i64 steps) {
    alone_.assign(steps + 1, {});
    for (const auto &row : work.rows) {
        if (row.is_awaited() || row.decodes <= 0)
            continue;
        const auto last = size_t(std::min(row.decodes, steps)) - 1;
        ++alone_[last].rows;
        alone_[last].context += row.prompt;
    }
    for (i64 step = steps - 2; step >= 0; --step) {
        alone_[step].rows += alone_[step + 1].rows;
        alone_[step].context += alone_[step + 1].context;
    }
    for (i64 step = 0; step < steps; ++step)
        alone_[step].context += alone_[step].rows * step;
}

// Rows join the residents as they arrive: step by step until all have come, or somebody is known to
// decode to the end.
i64 DecodesOnly::steps_with_arrivals(const Work &work, i64 alone, i64 limit) {
    if (alone == limit)
        return limit;
    count_alone(work, alone);
    leaves_.assign(limit, {});
    size_t arrived = 0;
    i64 step = 0, last = alone;
    Tally joined;
    for (double now_us = 0.0; arrived < arrivals_.size() && last < limit;) {
        joined.rows -= leaves_[step].rows;
        joined.context -= leaves_[step].context;
        leaves_[step] = {};
        for (; arrived < arrivals_.size() && arrivals_[arrived].us <= now_us; ++arrived) {
            const auto &row = work.rows[arrivals_[arrived].row];
            const i64 end = step + row.decodes;
            ++joined.rows;
            joined.context += row.prompt;
            last = std::max(last, end);
            if (end < limit) {
                ++leaves_[end].rows;
                leaves_[end].context += row.prompt + row.decodes;
            }
        }
        const auto there = step < alone ? alone_[step] : Tally{};
        if (const double rows = double(joined.rows + there.rows); rows > 0) {
            const double held = double(joined.context + there.context);
            now_us += work.about->cost.step_us(rows, held, held, rows);
            joined.context += joined.rows;
            ++step;
        } else {
            now_us = arrivals_[arrived].us;
        }
    }
    return std::min(limit, last);
}

// Anything

// Packs the steps of one instance, one after the other; see Packer in Python. clock: the steps in
// which rows decode; in time-share mode those are fewer than the steps.
class Packer {
  public:
    void pack(Work &work, const Order &order, Finished &finished);

  private:
    void begin(Work &work, const Order &order, Finished &finished);
    void sort_prompts();
    void seat_residents();
    void leave();
    void join();
    bool only_decodes() const;
    void decode_on();
    bool has_prompts() const { return !running_.empty() || waiting_ < prompts_.size(); }
    bool pack_step();
    bool unblock();
    i64 num_decoding() const;
    i64 take_chunks(i64 decoding, double &pairs);
    i64 prompt_budget(i64 decoding) const;
    i64 bound_of(size_t row) const;
    void finish(size_t row);
    void decode(size_t row);
    void leave_at(i64 clock, const WorkRow &row);
    void say_until();

    Work *work_ = nullptr;
    const Order *order_ = nullptr;
    Finished *finished_ = nullptr;
    std::vector<i64> position_; // of each prompt
    std::vector<i64> joined_;   // of each row, by the clock
    std::vector<size_t> running_, queue_, ended_;
    std::vector<size_t> prompts_;   // to be begun, from waiting_ on
    std::vector<size_t> standing_;  // residents without a place, from stood_ on
    std::vector<Arrival> arrivals_; // from arrived_ on
    size_t waiting_ = 0, stood_ = 0, arrived_ = 0;
    std::vector<Tally> leaves_; // by the clock, who is done
    i64 step_ = 0, clock_ = 0, active_ = 0, turns_ = 0, context_ = 0;
    i64 free_ = 0, returned_ = 0, seats_ = 0, reserve_ = 0;
    double now_us_ = 0.0;
};

void Packer::pack(Work &work, const Order &order, Finished &finished) {
    begin(work, order, finished);
    while (step_ < order.limit) {
        leave();
        join();
        if (only_decodes()) {
            decode_on();
            break;
        }
        if (!pack_step() && !unblock())
            break;
    }
    work.num_steps = step_;
    say_until();
}

void Packer::begin(Work &work, const Order &order, Finished &finished) {
    work_ = &work;
    order_ = &order;
    finished_ = &finished;
    step_ = clock_ = active_ = turns_ = context_ = returned_ = 0;
    now_us_ = 0.0;
    free_ = work.about->kv_blocks;
    seats_ = seats_of(*work.about);
    leaves_.assign(order.limit, {});
    joined_.assign(work.rows.size(), NOT_JOINED);
    sort_prompts();
    find_coming(work, finished, arrivals_);
    arrived_ = 0;
    reserve_ = work.num_prefills ? i64(arrivals_.size()) : 0;
    seat_residents();
}

void Packer::sort_prompts() {
    position_.clear();
    running_.clear();
    prompts_.clear();
    waiting_ = 0;
    for (size_t at = 0; at < work_->num_prefills; ++at) {
        const auto &row = work_->rows[at];
        position_.push_back(row.held);
        if (row.held > row.cached) {
            running_.push_back(at);
            free_ -= row.blocks;
        } else {
            prompts_.push_back(at);
        }
    }
}

// Residents decode from step 0, as many as a step takes; the rest as places get free.
void Packer::seat_residents() {
    standing_.clear();
    stood_ = 0;
    for (size_t at = work_->num_prefills; at < work_->rows.size(); ++at) {
        const auto &row = work_->rows[at];
        if (row.is_awaited() || row.decodes <= 0)
            continue;
        free_ -= row.blocks;
        if (active_ < seats_)
            decode(at);
        else
            standing_.push_back(at);
    }
}

// Rows whose last decode is behind give back their place and their blocks.
void Packer::leave() {
    free_ += returned_;
    returned_ = 0;
    auto &gone = leaves_[clock_];
    active_ -= gone.rows;
    context_ -= gone.context;
    free_ += gone.blocks;
    gone = {};
}

// Residents that stood and rows whose KV has arrived decode, where there is room.
void Packer::join() {
    for (; stood_ < standing_.size() && active_ < seats_; ++stood_)
        decode(standing_[stood_]);
    for (; arrived_ < arrivals_.size() && active_ < seats_; ++arrived_) {
        const auto &arrival = arrivals_[arrived_];
        if (arrival.us > now_us_ || work_->rows[arrival.row].blocks > free_)
            break;
        free_ -= work_->rows[arrival.row].blocks;
        decode(arrival.row);
    }
}

// Whether nothing happens any more but that rows decode and leave.
bool Packer::only_decodes() const {
    return !has_prompts() && stood_ == standing_.size() && arrived_ == arrivals_.size();
}

// The steps that are left, all at once, where only rows leave in between.
void Packer::decode_on() {
    const i64 left = order_->limit - step_;
    i64 rows = 0, last = 0;
    for (i64 clock = clock_; clock < i64(leaves_.size()); ++clock)
        if (leaves_[clock].rows) {
            rows += leaves_[clock].rows;
            last = clock - clock_;
        }
    const i64 steps = rows < active_ ? left : std::min(left, last);
    work_->exceeds_room |= steps > 0 && free_ < 0;
    step_ += steps;
    clock_ += steps;
}

// False where there is nothing to compute.
bool Packer::pack_step() {
    double pairs = 0.0;
    i64 decoding = num_decoding();
    const i64 tokens = take_chunks(decoding, pairs);
    decoding = tokens ? decoding : active_;
    if (!decoding && !tokens)
        return false;
    turns_ = tokens ? TURN : turns_ - 1;
    if (order_->is_timed) {
        const double context = decoding ? double(context_) : 0.0, rows = double(decoding);
        const auto &cost = work_->about->cost;
        now_us_ += cost.step_us(double(tokens) + rows, pairs + context, context, rows);
    }
    work_->exceeds_room |= free_ < 0;
    ++step_;
    if (decoding) {
        ++clock_;
        context_ += decoding;
    }
    for (const size_t row : ended_)
        finish(row);
    return true;
}

// Where nothing can be computed: wait for KV to come.
bool Packer::unblock() {
    if (arrived_ == arrivals_.size() || arrivals_[arrived_].us <= now_us_)
        return false;
    now_us_ = arrivals_[arrived_].us;
    return true;
}

// How many rows decode in this step if it has chunks.
i64 Packer::num_decoding() const {
    const bool is_turn = order_->mode == Mode::time_share && turns_ > 0;
    return order_->mode == Mode::hybrid || !has_prompts() || is_turn ? active_ : 0;
}

i64 Packer::prompt_budget(i64 decoding) const {
    const i64 most = work_->about->max_step_tokens;
    return most - decoding - std::min(reserve_, most / 2);
}

// Prompt tokens of the step, and the pairs they attend to; ended_: rows whose prompt ends in it.
i64 Packer::take_chunks(i64 decoding, double &pairs) {
    ended_.clear();
    if (!has_prompts() || (decoding && order_->mode != Mode::hybrid))
        return 0;
    const i64 budget = prompt_budget(decoding);
    // Whose prompt ends decodes from the next step on, beside all that decode now.
    i64 left = budget, seats = seats_ - active_;
    i64 partial = work_->about->max_partial_prefills ? work_->about->max_partial_prefills : seats;
    queue_.swap(running_);
    running_.clear();
    size_t queued = 0;
    for (; left > 0 && seats > 0 && partial > 0; --seats) {
        if (queued == queue_.size()) {
            // Those behind the first that waits for blocks wait for it.
            if (waiting_ == prompts_.size() || work_->rows[prompts_[waiting_]].blocks > free_)
                break;
            free_ -= work_->rows[prompts_[waiting_]].blocks;
            queue_.push_back(prompts_[waiting_++]);
        }
        const size_t row = queue_[queued++];
        const i64 begin = position_[row], end = std::min(begin + left, bound_of(row));
        work_->chunks.push_back({i32(step_), i32(row), begin, end});
        position_[row] = end;
        left -= end - begin;
        pairs += pairs_of(begin, end);
        if (end == work_->rows[row].prompt) {
            ended_.push_back(row);
        } else {
            running_.push_back(row);
            --partial;
        }
    }
    running_.insert(running_.end(), queue_.begin() + queued, queue_.end());
    return budget - left;
}

// Where the chunk ends that the row is in.
i64 Packer::bound_of(size_t row) const {
    const i64 prompt = work_->rows[row].prompt, begin = work_->rows[row].held;
    if (!order_->chunk)
        return prompt;
    const i64 whole = (position_[row] - begin) / order_->chunk;
    return std::min(prompt, begin + (whole + 1) * order_->chunk);
}

// The row's prompt is computed: it decodes here from the next step, or leaves.
void Packer::finish(size_t row) {
    const auto &one = work_->rows[row];
    (*finished_)[one.fresh] = now_us_;
    if (one.decodes)
        decode(row);
    else
        returned_ += one.blocks;
}

// The row decodes from the step that is packed next, and is done after its last one.
void Packer::decode(size_t at) {
    auto &row = work_->rows[at];
    row.begin = step_;
    joined_[at] = clock_;
    ++active_;
    context_ += row.prompt;
    if (const i64 end = clock_ + row.decodes; end < order_->limit) {
        auto &leaving = leaves_[end];
        ++leaving.rows;
        leaving.context += row.prompt + row.decodes;
        leaving.blocks += row.blocks;
    }
}

void Packer::say_until() {
    for (size_t at = 0; at < work_->rows.size(); ++at) {
        auto &row = work_->rows[at];
        const i64 here = std::min(joined_[at] + row.decodes, clock_) - joined_[at];
        const i64 taken = row.comes ? row.decodes : here;
        row.begin = row.comes ? 0 : row.begin;
        row.until = taken > 0 ? row.prompt + taken : 0;
    }
}

} // namespace

struct Packing::Parts {
    Order order;
    Finished finished;
    DecodesOnly decodes_only;
    Packer packer;

    void pack(Work &work);
    bool misses_some(const Work &work) const;
};

Packing::Packing(Mode mode, i64 chunk, i64 limit)
    : parts_(new Parts{{mode, chunk, limit, false}, {}, {}, {}}) {}

Packing::~Packing() = default;

void Packing::pack(const std::vector<Work *> &works, size_t num_fresh, bool is_timed) {
    parts_->order.is_timed = is_timed;
    parts_->finished.assign(num_fresh, NEVER);
    for (auto *work : works)
        parts_->pack(*work);
    for (auto *work : works)
        if (work->num_prefills && parts_->misses_some(*work))
            parts_->pack(*work);
}

void Packing::Parts::pack(Work &work) {
    work.chunks.clear();
    work.exceeds_room = false;
    for (auto &row : work.rows) {
        row.comes = false;
        row.begin = row.until = 0;
    }
    if (!work.num_prefills && decodes_only.pack(work, order, finished))
        return;
    if (work.num_prefills == work.rows.size() && line(work, order, finished))
        return;
    packer.pack(work, order, finished);
}

// Whether KV comes that nobody knew of when this was packed; two instances may await each other's.
bool Packing::Parts::misses_some(const Work &work) const {
    return std::any_of(work.rows.begin(), work.rows.end(), [&](const WorkRow &row) {
        return row.is_awaited() && !row.comes && will_come(work, row, finished);
    });
}

} // namespace sagec
