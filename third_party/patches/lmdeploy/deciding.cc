// Who decides a step, and what happens while nobody has.
#include "instance.h"

#include <algorithm>
#include <chrono>

namespace sagec::tm {
namespace {

// A held step's length. Each costs the engine one look at its queue, some 20 us; whoever has something
// for the engine calls wake, and then it ends at once.
constexpr std::int64_t kHoldUs = 5000;

// Waits on the clock of now_us.
void wait_until(std::condition_variable &condition, std::unique_lock<std::mutex> &lock,
                std::int64_t until_us) {
    using Clock = std::chrono::steady_clock;
    condition.wait_until(lock, Clock::time_point(std::chrono::microseconds(until_us)));
}

std::int64_t later(std::int64_t begin_us, std::int64_t wait_us) {
    constexpr std::int64_t kLongUs = std::int64_t{1} << 50; // 35 years
    return begin_us + std::min(wait_us, kLongUs);
}

} // namespace

// ---- the engine's side

void Instance::decide(const StepView &view, Decision &decision) {
    std::unique_lock lock(deciding_mutex_);
    std::optional<std::int64_t> hold_until_us; // a decision that is there costs no look at the clock
    for (;;) {
        if (is_closed_ || options.decider == SAGEC_TM_STOCK)
            return settle(decision, SAGEC_TM_BY_STOCK);
        if (decide_now(view, decision))
            return;
        const auto now = now_us();
        if (!waiting_since_us_)
            waiting_since_us_ = now;
        if (!hold_until_us)
            hold_until_us = later(now, kHoldUs);
        const auto deadline_us = later(*waiting_since_us_, options.deadline_us);
        if (now >= deadline_us)
            return settle(decision, SAGEC_TM_BY_DEADLINE);
        if (now >= *hold_until_us || num_wakes_seen_ != num_wakes_)
            break;
        wait_until(changed_, lock, std::min(*hold_until_us, deadline_us));
    }
    hold(decision);
}

void Instance::hold(Decision &decision) {
    decision.items.clear();
    decision.decided_by = options.decider == SAGEC_TM_PLANS ? SAGEC_TM_BY_PLAN : SAGEC_TM_BY_ANSWER;
    num_wakes_seen_ = num_wakes_;
    is_plan_fresh_ = false; // the engine looks at its queue now
}

bool Instance::decide_now(const StepView &view, Decision &decision) {
    const bool by_plan = options.decider == SAGEC_TM_PLANS;
    if (by_plan ? !take_plan_step(view, decision) : !take_answer(view, decision))
        return false;
    settle(decision, by_plan ? SAGEC_TM_BY_PLAN : SAGEC_TM_BY_ANSWER);
    return true;
}

// A step number is used up, by whatever was decided.
void Instance::settle(Decision &decision, int decided_by) {
    decision.decided_by = decided_by;
    decision.step = ++num_decided_;
    if (decided_by != SAGEC_TM_BY_PLAN)
        decision.plan = decision.plan_step = 0;
    if (decision.is_stock())
        decision.items.clear();
    is_asked_ = false;
    answer_.reset();
    waiting_since_us_.reset();
    num_wakes_seen_ = num_wakes_;
}

// Whom a plan names may have been queued just before it was posted, and cancelled ones too: where they
// are not there, the engine looks at its queue before the plan begins.
bool Instance::take_plan_step(const StepView &view, Decision &decision) {
    if (!plan_ || (is_plan_fresh_ && plan_->names_absent(view)))
        return false;
    gaps_.clear();
    is_plan_in_step_ = plan_->next(view, decision, gaps_);
    for (const auto &gap : gaps_)
        events.write(SAGEC_TM_GAP, {static_cast<std::int64_t>(gap.session), plan_->plan(), gap.plan_step,
                                    gap.begin, gap.computed});
    return is_plan_in_step_;
}

// The answer may be to the step as it was a moment ago: who has left since is nobody's to compute, and
// one that named nobody else is no answer.
bool Instance::take_answer(const StepView &view, Decision &decision) {
    if (answer_) {
        decision.items.clear();
        for (const auto &item : *answer_)
            if (view.find_row(item.session))
                decision.items.push_back(item);
        if (answer_->empty() || !decision.items.empty())
            return true;
        answer_.reset();
        ++num_decided_; // its number is used up
    }
    ask(view);
    return false;
}

void Instance::ask(const StepView &view) {
    question_ = view;
    is_asked_ = true;
    asked_.notify_all();
}

void Instance::end_step() {
    std::lock_guard lock(deciding_mutex_);
    is_plan_in_step_ = is_plan_fresh_ = false;
    if (next_plan_)
        take_over();
    else if (plan_ && plan_->is_done())
        tell_done();
}

void Instance::pause() {
    std::unique_lock lock(deciding_mutex_);
    const auto until_us = later(now_us(), kHoldUs);
    while (!is_closed_ && num_wakes_seen_ == num_wakes_ && now_us() < until_us)
        wait_until(changed_, lock, until_us);
    num_wakes_seen_ = num_wakes_;
    is_plan_fresh_ = false;
}

void Instance::rest() {
    std::lock_guard lock(deciding_mutex_);
    waiting_since_us_.reset();
    is_plan_fresh_ = false;
}

// ---- the other side

std::string Instance::post(const sagec_tm_plan &plan) {
    if (options.decider != SAGEC_TM_PLANS)
        return "instance " + std::to_string(number) + " does not take plans; open it with decider plans";
    if (auto why = check_plan(plan); !why.empty())
        return why;
    auto cursor = std::make_unique<PlanCursor>(plan);
    std::lock_guard lock(deciding_mutex_);
    if (plan.plan <= newest_plan_)
        return "plan " + std::to_string(plan.plan) + " is not newer than plan " +
               std::to_string(newest_plan_) + ", which was posted before it";
    newest_plan_ = plan.plan;
    if (next_plan_) // it never began
        events.write(SAGEC_TM_PLAN_DONE, {next_plan_->plan()});
    next_plan_ = std::move(cursor);
    is_plan_fresh_ = true;
    if (!is_plan_in_step_)
        take_over();
    ++num_wakes_; // whom it names may still be in the engine's queue
    changed_.notify_all();
    return "";
}

void Instance::take_over() {
    tell_done();
    plan_ = std::move(next_plan_);
    if (plan_->is_done()) // it has no steps
        tell_done();
}

void Instance::tell_done() {
    if (plan_)
        events.write(SAGEC_TM_PLAN_DONE, {plan_->plan()});
    plan_.reset();
}

bool Instance::wait_question(std::int64_t timeout_us, std::int64_t &step, StepView &question) {
    std::unique_lock lock(deciding_mutex_);
    const auto until_us = later(now_us(), timeout_us);
    const auto waits = [&] { return !is_closed_ && (!is_asked_ || answer_); };
    while (waits() && now_us() < until_us)
        wait_until(asked_, lock, until_us);
    if (is_closed_ || waits())
        return false;
    step = num_decided_ + 1;
    question = question_;
    return true;
}

std::string Instance::answer(std::int64_t step, const sagec_tm_item *items, int num_items) {
    std::lock_guard lock(deciding_mutex_);
    const auto name = "the answer to step " + std::to_string(step);
    if (!is_asked_ || answer_)
        return name + " comes too late: no step waits for one";
    if (step != num_decided_ + 1)
        return name + " does not fit: step " + std::to_string(num_decided_ + 1) + " is asked";
    for (int i = 0; i < num_items; ++i) {
        const auto session = items[i].session;
        if (session >> SAGEC_TM_INSTANCE_SHIFT != number)
            return name + " names session " + std::to_string(session) + ", which is none of instance " +
                   std::to_string(number) + "'s";
        if (std::any_of(items, items + i, [&](const auto &other) { return other.session == session; }))
            return name + " names session " + std::to_string(session) + " twice";
    }
    answer_.emplace(items, items + num_items);
    changed_.notify_all();
    return "";
}

void Instance::wake() {
    std::lock_guard lock(deciding_mutex_);
    ++num_wakes_;
    changed_.notify_all();
}

void Instance::close() {
    std::lock_guard lock(deciding_mutex_);
    is_closed_ = true;
    changed_.notify_all();
    asked_.notify_all();
    events.close();
}

} // namespace sagec::tm
