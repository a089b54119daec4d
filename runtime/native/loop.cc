// The serving loop: runtime/loop.py, for what can happen where nothing fails and nobody cancels.
#include "loop.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

namespace sagec {

namespace {

constexpr i64 LEAD_STEPS = 2;
constexpr i64 FUTILE_ROUNDS = 8;

std::vector<i64> rooms_of(const std::vector<Member> &members) {
    std::vector<i64> rooms;
    for (const Member &member : members)
        rooms.push_back(member.room_tokens());
    return rooms;
}

} // namespace

Loop::Loop(const std::vector<Member> &members, const std::vector<Request> &requests,
           const std::vector<char> &refused, Directory directory, Planner &planner,
           PlanElsewhere plan_elsewhere, Meter &meter, CatchUp catch_up)
    : members_(members), refused_(refused), fifo_(members), table_(requests, rooms_of(members)),
      directory_(std::move(directory)), planner_(planner), plan_elsewhere_(std::move(plan_elsewhere)),
      meter_(meter), catch_up_(std::move(catch_up)), at_work_(members.size()),
      seen_{round_.running, {}, {}, {}} {}

// Inputs

void Loop::arrive(i32 request) {
    table_.add(request);
    changed();
    if (refused_[request]) {
        finish(request, Ending::refused);
    } else {
        wait(request, table_[request].prompt_tokens);
    }
}

void Loop::hear(const Event &event) {
    switch (event.kind) {
    case Event::stepped:
        return stepped(event);
    case Event::exported:
        return exported(event);
    case Event::imported:
        return imported(event);
    case Event::cached:
        return directory_.changed(event.instance, event.stored, event.evicted);
    case Event::preempted:
        return preempted(event);
    case Event::plan_done:
        return plan_done(event);
    case Event::cancelled:
        return cancelled(event);
    case Event::failed:
        break;
    }
    throw NotCovered("a request failed on an instance: " + event.error);
}

void Loop::decide() {
    if (is_due_)
        ask();
    if (!is_closed_ || is_due_ || !table_.num_live() || !table_.leaving().empty())
        return;
    for (const AtWork &plan : at_work_) {
        if (plan.is_there())
            return;
    }
    throw NotCovered("requests for which neither the strategy nor the planner finds a place");
}

// Engines

void Loop::stepped(const Event &report) {
    futile_rounds_ = 0;
    for (const auto &reuse : report.reused) {
        Serving &row = table_[reuse.request];
        if (!is_on(row, report.instance))
            continue;
        row.reused_tokens += reuse.tokens;
        row.computed_tokens = reuse.tokens;
    }
    for (const auto &chunk : report.chunks) {
        Serving &row = table_[chunk.request];
        if (is_on(row, report.instance))
            row.computed_tokens = chunk.end;
    }
    count_tokens(report);
    for (const i32 request : report.finished) {
        if (is_on(table_[request], report.instance))
            finish(request, Ending::served);
    }
    if (!report.finished.empty() && !table_.waiting().empty())
        changed();
    const AtWork &plan = at_work_[report.instance];
    const bool is_long = plan.num_steps > 2 * LEAD_STEPS;
    if (plan.is_there() && plan.round == report.plan_round && is_long) {
        is_due_ |= report.step + 1 >= plan.num_steps - LEAD_STEPS;
    }
}

void Loop::count_tokens(const Event &report) {
    const i64 first_us = report.begin_us + (report.end_us - report.begin_us) / report.steps;
    for (const auto &advance : report.advanced) {
        const Serving &row = table_[advance.request];
        if (!is_on(row, report.instance))
            continue;
        if (row.base + advance.first != row.output_tokens) {
            throw NotCovered("tokens of a request that were lost");
        }
        table_.counted(advance.request, report.steps, first_us, report.end_us);
    }
}

void Loop::exported(const Event &event) {
    const Handle &handle = event.handle;
    Serving &row = table_[handle.request];
    if (!is_on(row, handle.source))
        return; // nobody will receive it
    row.known_on = NOBODY;
    // Who was to be preempted and has left already loses that KV instead.
    if (row.phase == Phase::leaving)
        return go_on_waiting(handle.request);
    if (!table_.waiting().empty() || !imports(handle.target, handle.request))
        changed();
    row.known_on = handle.target;
    row.ran_on.push_back(handle.target);
    drop_shadow(handle.request, handle.target);
    table_.move(handle.request, handle.target, true);
    row.computed_tokens = handle.computed_tokens;
    Action action;
    action.kind = Action::deliver;
    action.instance = handle.target;
    action.handle = handle;
    actions_.push_back(std::move(action));
}

void Loop::imported(const Event &event) {
    futile_rounds_ = 0;
    const Serving &row = table_[event.request];
    if (row.phase == Phase::absent || row.instance != event.instance)
        return;
    table_.move(event.request, event.instance, false);
}

void Loop::preempted(const Event &event) {
    Serving &row = table_[event.request];
    if (!is_on(row, event.instance))
        return;
    if (event.kept_tokens)
        throw NotCovered("KV that is swapped out");
    ++row.preemptions;
    go_on_waiting(event.request);
}

void Loop::plan_done(const Event &event) {
    AtWork &plan = at_work_[event.instance];
    if (!plan.is_there() || plan.round != event.plan_round)
        return;
    plan.round = NOBODY;
    is_due_ |= is_idle_in_vain();
}

void Loop::cancelled(const Event &event) {
    Serving &row = table_[event.request];
    if (row.phase != Phase::leaving || row.instance != event.instance)
        return;
    row.known_on = NOBODY;
    go_on_waiting(event.request);
}

// Requests

// Whether what the instance says of the request counts: else it came too late.
bool Loop::is_on(const Serving &row, i32 instance) const {
    const bool is_placed = row.phase == Phase::running || row.phase == Phase::leaving;
    return is_placed && row.instance == instance && !row.arriving;
}

bool Loop::imports(i32 instance, i32 request) const {
    const AtWork &plan = at_work_[instance];
    const auto &known = plan.imports;
    return plan.is_there() && std::find(known.begin(), known.end(), request) != known.end();
}

bool Loop::is_idle_in_vain() const {
    return !table_.waiting().empty() || is_on_idle(table_.running()) || is_on_idle(table_.leaving());
}

bool Loop::is_on_idle(const InOrder &requests) const {
    return std::any_of(requests.begin(), requests.end(), [this](i32 request) {
        const Serving &row = table_[request];
        return !at_work_[row.instance].is_there() || !at_work_[row.decode_on].is_there();
    });
}

void Loop::wait(i32 request, i64 prompt_tokens) {
    table_.wait(request, prompt_tokens);
    const Serving &row = table_[request];
    directory_.wait(request, row.output_tokens);
    if (fifo_.is_too_long(prompt_tokens, row.remaining_tokens))
        table_.note_too_long(request);
}

void Loop::go_on_waiting(i32 request) {
    changed();
    wait(request, table_.asked(request).prompt_tokens + table_[request].output_tokens);
}

// Let an instance forget what the request was before, unless its KV goes there anyway.
void Loop::drop_shadow(i32 request, i32 keep) {
    Serving &row = table_[request];
    if (row.shadow_on != NOBODY && row.shadow_on != keep)
        cancel_on(request, row.shadow_on);
    row.shadow_on = NOBODY;
}

void Loop::cancel_on(i32 request, i32 instance) {
    Action action;
    action.kind = Action::cancel;
    action.instance = instance;
    action.request = request;
    actions_.push_back(std::move(action));
}

void Loop::finish(i32 request, Ending ending) {
    const Serving &row = table_[request];
    drop_shadow(request);
    if (ending != Ending::served && row.known_on != NOBODY)
        cancel_on(request, row.known_on);
    ended_.push_back({request, ending, std::max(now_us_, row.last_token_us)});
    table_.remove(request);
}

// Rounds

void Loop::ask() {
    is_due_ = false;
    if (!table_.is_anybody())
        return;
    owed_.clear();
    catch_up_(owed_);
    for (const Event &event : owed_)
        hear(event);
    is_due_ = false;
    see();
    fifo_.decide(seen_, table_, decision_);
    see_admitted();
    const i64 num_waiting = table_.waiting().size(), num_running = table_.running().size();
    const bool is_futile = futile_rounds_ > FUTILE_ROUNDS;
    std::vector<Plan> plans = is_futile ? std::vector<Plan>() : planned();
    for (const i32 request : decision_.rejected)
        finish(request, Ending::too_long);
    if (is_futile)
        return;
    ++round_number_;
    ++futile_rounds_;
    meter_.planned(now_us_, num_waiting, num_running);
    for (Plan &plan : plans)
        submit(std::move(plan));
}

// What the strategy and the planner see: running requests and instances.
void Loop::see() {
    const std::size_t count = members_.size();
    seen_.used.assign(count, 0);
    seen_.growing.assign(count, 0);
    seen_.needed.assign(count, 0);
    round_.running.clear();
    for (const i32 request : table_.running()) {
        const Serving &row = table_[request];
        const i64 remaining = table_.remaining_tokens(row);
        const bool is_begun = row.computed_tokens > 0;
        const i64 cached = is_begun ? 0 : directory_.cached_tokens(request, row.prompt_tokens, row.instance);
        round_.running.push_back({request, row.instance, row.decode_on, row.prompt_tokens,
                                  row.computed_tokens, remaining, cached, row.arriving});
        ++seen_.growing[row.instance];
        seen_.needed[row.instance] += count_blocks(row);
    }
    for (const i32 request : table_.leaving())
        count_blocks(table_[request]);
    round_.idle.resize(count);
    for (std::size_t at = 0; at < count; ++at)
        round_.idle[at] = !at_work_[at].is_there();
}

// Take the row's blocks into account; those where it is.
i64 Loop::count_blocks(const Serving &row) {
    const i64 tokens = next_tokens(row.prompt_tokens, row.computed_tokens);
    const i64 here = blocks_for(tokens, members_[row.instance].block_tokens);
    seen_.used[row.instance] += here;
    if (row.decode_on != row.instance) {
        seen_.used[row.decode_on] += blocks_for(tokens, members_[row.decode_on].block_tokens);
    }
    return here;
}

// What the planner is told of who waits.
void Loop::see_admitted() {
    const std::size_t count = members_.size();
    round_.number = round_number_;
    round_.any_waiting = !table_.waiting().empty();
    round_.preempted = decision_.preempted;
    round_.admitted.clear();
    cached_.assign(count * std::max<std::size_t>(decision_.admitted.size(), 1), 0);
    i64 *cached = cached_.data();
    for (const i32 request : decision_.admitted) {
        const Serving &row = table_[request];
        round_.admitted.push_back({request, row.prompt_tokens, row.remaining_tokens, cached});
        for (std::size_t at = 0; at < count && directory_.has_caches(); ++at) {
            const auto instance = static_cast<i32>(at);
            cached[at] = directory_.cached_tokens(request, row.prompt_tokens, instance);
        }
        if (directory_.has_caches())
            cached += count;
    }
}

// The plans of the round; those of Python where they are for the compiler.
std::vector<Plan> Loop::planned() {
    try {
        return planner_.plan(round_);
    } catch (const NotCovered &) {
        return plan_elsewhere_(state());
    }
}

// What State in runtime/state.py has beside what the requests say.
Columns Loop::state() const {
    Columns state;
    put_asked("waiting.", table_.waiting(), state);
    put_asked("running.", table_.running(), state);
    const auto put = [&](const std::string &name, auto value_of) {
        state.put("running." + name, column_of(round_.running, value_of));
    };
    put("instance", [](const Running &one) { return one.instance; });
    put("decode_on", [](const Running &one) { return one.decode_on; });
    put("arriving", [](const Running &one) { return one.arriving; });
    put("remaining_tokens", [](const Running &one) { return one.remaining_tokens; });
    put("cached_tokens", [](const Running &one) { return one.cached_tokens; });
    std::vector<i64> cached;
    for (const i32 request : table_.waiting()) {
        for (std::size_t at = 0; at < members_.size(); ++at) {
            const i64 tokens = table_[request].prompt_tokens;
            cached.push_back(directory_.cached_tokens(request, tokens, static_cast<i32>(at)));
        }
    }
    state.put("waiting.cached_tokens", std::move(cached));
    state.put("instances.kv_blocks_used", seen_.used);
    state.put("instances.idle", std::vector<i64>(round_.idle.begin(), round_.idle.end()));
    state.put("now_us", std::vector<i64>{now_us_});
    state.put("round", std::vector<i64>{round_number_});
    return state;
}

// Columns that waiting and running requests have.
void Loop::put_asked(const std::string &prefix, const InOrder &requests, Columns &state) const {
    state.put(prefix + "request", std::vector<i64>(requests.begin(), requests.end()));
    const auto put = [&](const std::string &name, i64 Serving::*field) {
        const auto value_of = [&](i32 request) { return table_[request].*field; };
        state.put(prefix + name, column_of(requests, value_of));
    };
    put("prompt_tokens", &Serving::prompt_tokens);
    put("computed_tokens", &Serving::computed_tokens);
    put("generate_tokens", &Serving::remaining_tokens);
    put("output_tokens", &Serving::output_tokens);
    put("first_token_us", &Serving::first_token_us);
    put("preemptions", &Serving::preemptions);
}

void Loop::submit(Plan plan) {
    const std::size_t count = plan.requests.size();
    targets_.assign(count, plan.instance);
    for (const Plan::Move &move : plan.exports)
        targets_[move.row] = move.peer;
    computes_.assign(count, 0);
    for (const Plan::Chunk &chunk : plan.chunks)
        computes_[chunk.row] = 1;
    Action action;
    for (std::size_t row = 0; row < count; ++row) {
        if (!computes_[row])
            continue;
        begin_row(plan.requests[row], plan.instance, targets_[row], action.requests);
    }
    for (const i32 row : plan.preemptions) {
        const i32 request = plan.requests[row];
        if (table_[request].phase != Phase::absent)
            table_.leave(request);
    }
    AtWork &at_work = at_work_[plan.instance];
    at_work.round = plan.round;
    at_work.num_steps = plan.num_steps;
    at_work.imports.clear();
    for (const Plan::Move &move : plan.imports)
        at_work.imports.push_back(plan.requests[move.row]);
    action.instance = plan.instance;
    action.plan = std::move(plan);
    actions_.push_back(std::move(action));
}

// A plan computes tokens of a request's prompt: the request is there from now on.
void Loop::begin_row(i32 request, i32 instance, i32 target, std::vector<Sent> &sent) {
    Serving &row = table_[request];
    if (row.phase == Phase::absent)
        return;
    if (row.phase == Phase::waiting)
        place(request, instance, sent);
    if (row.instance != instance)
        return;
    row.decode_on = target;
    if (row.shadow_on != target)
        drop_shadow(request);
}

void Loop::place(i32 request, i32 instance, std::vector<Sent> &sent) {
    Serving &row = table_[request];
    const Request &asked = table_.asked(request);
    table_.run(request, instance);
    if (row.admitted_us == NEVER)
        row.admitted_us = std::max(now_us_, asked.arrival_us);
    row.ran_on.push_back(instance);
    if (row.known_on == instance)
        return;
    if (row.known_on != NOBODY) {
        drop_shadow(request);
        row.shadow_on = row.known_on;
    }
    row.known_on = instance;
    row.base = row.output_tokens;
    const bool is_bounded = asked.max_output_tokens != UNBOUNDED;
    const i64 limit = is_bounded ? asked.max_output_tokens : limit_tokens(asked.prompt_tokens);
    const i64 prompt_tokens = asked.prompt_tokens + row.output_tokens;
    sent.push_back({request, prompt_tokens, std::max<i64>(1, limit - row.output_tokens)});
}

// Output that any instance can hold after a prompt of this length.
i64 Loop::limit_tokens(i64 prompt_tokens) const {
    std::optional<i64> smallest;
    for (const Member &member : members_) {
        const i64 room = member.room_tokens();
        const bool holds = member.decodes && room > prompt_tokens;
        if (holds)
            smallest = std::min(room, smallest.value_or(room));
    }
    return smallest.value_or(1) - prompt_tokens;
}

} // namespace sagec
