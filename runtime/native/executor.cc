// Instances, their events and the time between them: runtime/executor.py under a virtual clock.
#include "executor.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace sagec {

namespace {

constexpr i64 MOST_LOOKS = 2'000; // while no time passes

} // namespace

Executor::Executor(const std::vector<Member> &members, const std::vector<EngineSpec> &specs,
                   const std::vector<Request> &requests, const std::vector<char> &refused,
                   Directory directory, std::shared_ptr<Network> network, Planner &planner,
                   Loop::PlanElsewhere plan_elsewhere)
    : requests_(requests), network_(std::move(network)), alarms_(static_cast<i32>(specs.size())),
      meter_(specs.size(), requests.size()),
      loop_(members, requests, refused, std::move(directory), planner, std::move(plan_elsewhere), meter_,
            [this](std::vector<Event> &events) { catch_up(events); }) {
    engines_.reserve(specs.size());
    for (const EngineSpec &spec : specs) {
        engines_.push_back(std::make_unique<SimEngine>(spec, requests, network_));
    }
}

bool Executor::advance(i64 turns) {
    for (i64 count = 0; count < turns && !loop_.is_done(); ++count)
        turn();
    return !loop_.is_done();
}

void Executor::turn() {
    wait_for_inputs();
    loop_.set_time(now_us_);
    for (const i32 request : arrived_)
        loop_.arrive(request);
    if (closes_)
        loop_.close();
    for (const Event &event : events_)
        loop_.hear(event);
    loop_.decide();
    perform(loop_.actions());
}

// What is next: requests whose time has come, that no more will, or events.
void Executor::wait_for_inputs() {
    arrived_.clear();
    events_.clear();
    closes_ = false;
    for (;;) {
        check_progress();
        const bool lets_in = is_open();
        if (lets_in)
            arrive();
        closes_ = owes_close_ && next_ == requests_.size();
        if (closes_)
            owes_close_ = false;
        const std::optional<i64> coming_us = lets_in ? next_us() : opens_us_;
        poll(events_);
        if (closes_ || !arrived_.empty() || !events_.empty())
            return;
        jump(coming_us);
    }
}

std::optional<i64> Executor::next_us() const {
    if (next_ == requests_.size())
        return std::nullopt;
    return requests_[next_].arrival_us;
}

void Executor::arrive() {
    for (; next_ < requests_.size() && requests_[next_].arrival_us <= now_us_; ++next_) {
        arrived_.push_back(static_cast<i32>(next_));
    }
}

// Whether requests whose time has come are let in now: together, when the first instance can begin
// something new.
bool Executor::is_open() {
    const std::optional<i64> coming_us = next_us();
    if (!coming_us || *coming_us > now_us_)
        return true;
    if (!opens_us_) {
        for (const auto &engine : engines_) {
            const i64 end_us = engine->step_end_us(now_us_).value_or(now_us_);
            opens_us_ = std::min(end_us, opens_us_.value_or(end_us));
        }
    }
    if (now_us_ < *opens_us_)
        return false;
    opens_us_.reset();
    return true;
}

// What happened on instances that may have something to say.
void Executor::poll(std::vector<Event> &events) {
    wake_concerned();
    for (const i32 instance : alarms_.due(now_us_))
        hear(instance, events);
}

// Steps that have ended in the midst of what instances will tell of at once.
void Executor::catch_up(std::vector<Event> &events) {
    owing_.clear();
    for (std::size_t at = 0; at < engines_.size(); ++at) {
        const std::optional<i64> since_us = engines_[at]->owed_since_us();
        if (since_us && *since_us <= now_us_)
            owing_.push_back(static_cast<i32>(at));
    }
    for (const i32 instance : owing_)
        hear(instance, events);
}

void Executor::hear(i32 instance, std::vector<Event> &events) {
    std::vector<Event> said = engines_[instance]->poll(now_us_);
    alarms_.set(instance, engines_[instance]->next_us(now_us_));
    for (const Event &event : said)
        meter_.hear(event);
    std::move(said.begin(), said.end(), std::back_inserter(events));
}

// Whether time will ever pass.
void Executor::check_progress() {
    if (now_us_ != looked_at_us_)
        looks_ = 0;
    looked_at_us_ = now_us_;
    if (++looks_ > MOST_LOOKS)
        throw NotCovered("instances that go in circles while no time passes");
}

// Let the clock jump to what happens next.
void Executor::jump(std::optional<i64> coming_us) {
    wake_concerned();
    if (alarms_.is_anyone_awake())
        return;
    const std::optional<i64> alarm_us = alarms_.next_us();
    const std::optional<i64> either_us = alarm_us ? alarm_us : coming_us;
    if (!either_us)
        throw NotCovered("a cluster in which nothing will ever happen");
    now_us_ = std::max(now_us_, std::min(*either_us, coming_us.value_or(*either_us)));
}

// Ask those, too, whose KV may arrive at another time now.
void Executor::wake_concerned() {
    for (const i32 instance : take_concerned(*network_))
        alarms_.wake(instance);
}

void Executor::perform(std::vector<Action> &actions) {
    for (Action &action : actions) {
        alarms_.wake(action.instance);
        SimEngine &engine = *engines_[action.instance];
        switch (action.kind) {
        case Action::submit:
            engine.submit(std::move(action.plan), std::move(action.requests));
            break;
        case Action::deliver:
            engine.receive(action.handle);
            break;
        case Action::cancel:
            engine.cancel(action.request);
            break;
        }
    }
    actions.clear();
}

} // namespace sagec
