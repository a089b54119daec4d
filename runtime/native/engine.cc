// The simulated instance: plans in; steps that take their time, and events, out. See
// runtime/engines/sim/engine.py; an instance here never fails, and swaps nothing.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <variant>

#include "network.h"
#include "residents.h"
#include "running.h"

namespace sagec {

namespace {

// KV that is on its way here, or waits for room. transfer: its number in the network, if any.
struct Received {
    Handle handle;
    i32 transfer = NOBODY;
};

struct Submitted {
    Plan plan;
    std::vector<Sent> requests;
};

using Message = std::variant<Submitted, Handle, i32>; // the last: a request that is cancelled

TransferKey key_of(const Handle &handle) { return {handle.source, handle.request, handle.begin_us}; }

} // namespace

struct SimEngine::Parts {
    Parts(const EngineSpec &spec, const std::vector<Request> &requests, std::shared_ptr<Network> network)
        : spec(spec), network(std::move(network)),
          residents(spec.kv_blocks, spec.block_tokens, spec.caches, requests), gone(requests.size()),
          received_at(requests.size(), NOBODY) {}

    std::vector<Event> poll(i64 now);
    void tell_changes();
    void follow();
    void end_with_arrivals();
    void turn();
    void begin_next();

    void tell(std::size_t steps);
    void advance(Event &report, std::size_t steps);
    void find_finished(Event &report) const;
    bool has_ended(const Row &row) const;

    void hear_inbox();
    void hear(Submitted &message);
    void hear(const Handle &handle);
    void hear(i32 cancelled);
    void enter(const Sent &sent);
    void preempt();
    void forget_placed_elsewhere();
    void check_known() const;
    void finish_plan();
    void leave(i32 request);

    bool is_received(i32 request) const { return received_at[request] != NOBODY; }
    void forget_received(i32 request);
    void export_ready(i64 at_us);
    i64 send(const Handle &handle);
    i64 line_arrival_us(const Handle &handle) const;
    i64 arrival_us(const Received &one) const;
    std::optional<i64> next_arrival_us(i64 after_us) const;
    void import_arrived();
    bool take_in(const Plan::Move &import);
    bool awaits() const;
    bool is_to_come(i32 request) const;

    Event &say(Event::Kind kind);

    const EngineSpec spec;
    const std::shared_ptr<Network> network;
    Residents residents;
    RunningPlan running;
    Stretch stretch;
    bool is_running = false, is_computing = false; // whether there are the two above
    std::vector<Message> inbox;
    std::vector<Received> received;
    std::vector<char> gone;       // by request: whether it left
    std::vector<i32> received_at; // by request: where in `received`
    std::vector<Event> events;
    i64 now_us = -1, free_at_us = 0, network_changes = 0;
};

// ---- Turns

std::vector<Event> SimEngine::Parts::poll(i64 now) {
    now_us = now;
    if (network)
        follow();
    const bool is_idle = !is_running && !is_computing;
    const bool is_amid_step = is_computing && now_us < stretch.step_ends_us();
    if (!inbox.empty() || !(is_idle || is_amid_step)) {
        turn();
        tell_changes();
    }
    return std::exchange(events, {});
}

// What is in the prefix cache now, and no longer.
void SimEngine::Parts::tell_changes() {
    if (!residents.index())
        return;
    auto [stored, evicted] = residents.index()->take_changes();
    if (stored.empty() && evicted.empty())
        return;
    Event &event = say(Event::cached);
    event.stored = std::move(stored);
    event.evicted = std::move(evicted);
}

// Transfers may come at other times than was thought when the stretch began.
void SimEngine::Parts::follow() {
    network->settle(now_us);
    if (network->changes() == network_changes)
        return;
    network_changes = network->changes();
    if (is_running && is_computing)
        end_with_arrivals();
}

// KV that comes joins at the next step: the second one, where it comes while the first is being
// planned.
void SimEngine::Parts::end_with_arrivals() {
    if (const auto arrival_us = next_arrival_us(now_us + 1))
        stretch.end_with_the_step_at(std::max(*arrival_us, stretch.told_until_us() + 1));
}

// Tell of steps that ended, hear what came in and begin what is next.
void SimEngine::Parts::turn() {
    if (is_computing) {
        if (const std::size_t over = stretch.over_by(now_us))
            tell(over);
        if (!inbox.empty())
            stretch.end_with_the_step_at(now_us);
        if (!stretch.is_done())
            return;
        is_computing = false;
    }
    residents.recycle();
    hear_inbox();
    if (is_running)
        begin_next();
}

void SimEngine::Parts::begin_next() {
    import_arrived();
    const i64 begin_us = std::max(free_at_us, now_us);
    is_computing = running.next_stretch(residents, spec.cost, begin_us, stretch);
    if (is_computing)
        end_with_arrivals();
    else if (running.is_over() || !awaits())
        finish_plan();
}

// ---- Reports

// Report so many more steps of the stretch, and what came of them.
void SimEngine::Parts::tell(std::size_t steps) {
    Event &report = say(Event::stepped);
    report.plan_round = running.plan().round;
    report.begin_us = stretch.told_until_us();
    report.steps = static_cast<i64>(steps);
    advance(report, steps);
    running.step = stretch.first + static_cast<i64>(stretch.done);
    report.step = running.step - 1;
    report.end_us = free_at_us = stretch.told_until_us();
    find_finished(report);
    report.kv_blocks_used = residents.used_blocks();
    report.reused.swap(residents.reused);
    for (const i32 request : report.finished)
        leave(request);
    export_ready(report.end_us);
}

// Have the rows be so many steps further.
void SimEngine::Parts::advance(Event &report, std::size_t steps) {
    const i64 count = static_cast<i64>(steps);
    report.decodes.reserve(stretch.decodes.size());
    report.advanced.reserve(stretch.decodes.size() + stretch.chunks.size());
    for (Row *row : stretch.decodes) {
        report.decodes.push_back(row->request());
        report.advanced.push_back({row->request(), row->num_output(), count});
        row->computed += count;
        row->num_tokens += count;
    }
    stretch.done += steps;
    for (const Computed &chunk : stretch.chunks) {
        Row &row = *chunk.row;
        const bool is_lone = !stretch.reached.empty();
        const i64 begin = is_lone ? row.computed : chunk.begin;
        const i64 end = is_lone ? stretch.reached[stretch.done - 1] : chunk.end;
        report.chunks.push_back({row.request(), begin, end});
        row.computed = end;
        residents.store(row);
        if (end == row.num_tokens)
            report.advanced.push_back({row.request(), row.num_output(), 1});
        row.num_tokens += end == row.num_tokens;
    }
}

// Rows that have all their tokens, or no room for more and nowhere to go.
void SimEngine::Parts::find_finished(Event &report) const {
    for (const Row *row : stretch.decodes)
        if (has_ended(*row))
            report.finished.push_back(row->request());
    for (const Computed &chunk : stretch.chunks)
        if (chunk.row->num_output() && has_ended(*chunk.row))
            report.finished.push_back(chunk.row->request());
}

bool SimEngine::Parts::has_ended(const Row &row) const {
    if (row.num_tokens >= row.limit)
        return true;
    const auto is_its = [&](const Plan::Move &move) { return running.request(move.row) == row.request(); };
    const auto &exports = running.exports;
    return row.num_tokens >= residents.room_tokens && std::none_of(exports.begin(), exports.end(), is_its);
}

Event &SimEngine::Parts::say(Event::Kind kind) {
    if (events.empty())
        events.reserve(4);
    Event &event = events.emplace_back();
    event.kind = kind;
    event.instance = spec.id;
    return event;
}

// ---- What it was told

void SimEngine::Parts::hear_inbox() {
    for (Message &message : inbox)
        std::visit([this](auto &one) { hear(one); }, message);
    inbox.clear();
}

void SimEngine::Parts::hear(const Handle &handle) {
    residents.drop(handle.request);
    forget_received(handle.request);
    received_at[handle.request] = static_cast<i32>(received.size());
    received.push_back({handle, network ? network->find(key_of(handle)) : NOBODY});
}

void SimEngine::Parts::hear(i32 cancelled) {
    leave(cancelled);
    forget_received(cancelled);
    say(Event::cancelled).request = cancelled;
}

// Let a plan take over from the one at work.
void SimEngine::Parts::hear(Submitted &message) {
    finish_plan();
    for (const Sent &sent : message.requests)
        enter(sent);
    running.begin(std::move(message.plan));
    is_running = true;
    free_at_us = std::max(free_at_us, now_us) + spec.round_us;
    preempt();
    forget_placed_elsewhere();
    residents.keep_only(running.plan().requests, running.plan().kv_blocks);
    check_known();
    export_ready(now_us);
}

void SimEngine::Parts::enter(const Sent &sent) {
    forget_received(sent.request);
    gone[sent.request] = false;
    if (std::string error = residents.refusal(sent); error.empty()) {
        residents.add(sent);
    } else {
        leave(sent.request);
        Event &failed = say(Event::failed);
        failed.request = sent.request;
        failed.error = std::move(error);
    }
}

void SimEngine::Parts::preempt() {
    for (const i32 plan_row : running.plan().preemptions) {
        Row *row = residents.find(running.request(plan_row));
        if (!row)
            continue;
        residents.let_go(*row);
        row->computed = 0;
        say(Event::preempted).request = row->request();
    }
}

// What was here of requests, without KV, whose KV comes from where they were placed since.
void SimEngine::Parts::forget_placed_elsewhere() {
    for (const Plan::Move &import : running.plan().imports) {
        const i32 request = running.request(import.row);
        gone[request] = false;
        const Row *row = residents.find(request);
        if (row && !row->computed)
            residents.drop(request);
    }
}

void SimEngine::Parts::check_known() const {
    const Plan &plan = running.plan();
    for (const i32 request : plan.requests) {
        if (residents.find(request) || is_received(request) || gone[request])
            continue;
        const auto is_its = [&](const auto &move) { return running.request(move.row) == request; };
        if (std::none_of(plan.imports.begin(), plan.imports.end(), is_its))
            throw NotCovered("a plan that names a request which never came to its instance");
    }
}

void SimEngine::Parts::finish_plan() {
    if (is_running)
        say(Event::plan_done).plan_round = running.plan().round;
    is_running = false;
}

void SimEngine::Parts::leave(i32 request) {
    residents.drop(request);
    gone[request] = true;
}

// ---- KV between instances

// Send away the rows whose first token is sampled.
void SimEngine::Parts::export_ready(i64 at_us) {
    auto &exports = running.exports;
    std::size_t kept = 0;
    for (const Plan::Move move : exports) {
        Row *row = residents.find(running.request(move.row));
        if (!row || !row->decodes() || !residents.make_room(*row, row->computed)) {
            exports[kept++] = move;
            continue;
        }
        Handle handle;
        handle.request = row->request();
        handle.sent = row->sent;
        handle.source = spec.id;
        handle.target = move.peer;
        handle.output_tokens = row->num_output();
        handle.computed_tokens = row->computed;
        handle.num_bytes = std::llrint(row->computed * spec.cost.kv_bytes_per_token);
        handle.begin_us = at_us;
        leave(handle.request);
        const i64 end_us = send(handle);
        Event &exported = say(Event::exported);
        exported.handle = handle;
        exported.end_us = end_us;
    }
    exports.resize(kept);
}

// Have the KV go; when it arrives.
i64 SimEngine::Parts::send(const Handle &handle) {
    if (!network)
        return line_arrival_us(handle);
    const TransferKey key = key_of(handle);
    network->begin(key, handle.target, handle.num_bytes, spec.link_bytes_per_s, spec.link_latency_us);
    return network->arrival_us(network->find(key));
}

i64 SimEngine::Parts::line_arrival_us(const Handle &handle) const {
    const double bytes_us = 1e6 * static_cast<double>(handle.num_bytes) / spec.link_bytes_per_s;
    return handle.begin_us + std::llrint(spec.link_latency_us + bytes_us);
}

i64 SimEngine::Parts::arrival_us(const Received &one) const {
    if (one.transfer == NOBODY)
        return line_arrival_us(one.handle);
    return network->arrival_us(one.transfer);
}

// When KV that the plan imports arrives next, at this time or later.
std::optional<i64> SimEngine::Parts::next_arrival_us(i64 after_us) const {
    std::optional<i64> next_us;
    if (received.empty())
        return next_us;
    for (const Plan::Move &import : running.plan().imports) {
        const i32 at = received_at[running.request(import.row)];
        if (at == NOBODY)
            continue;
        const i64 us = arrival_us(received[at]);
        if (us >= after_us && (!next_us || us < *next_us))
            next_us = us;
    }
    return next_us;
}

// Take in KV that has come, in the order of the plan, as far as there is room.
void SimEngine::Parts::import_arrived() {
    for (const Plan::Move &import : running.plan().imports) {
        if (received.empty())
            return;
        const i32 at = received_at[running.request(import.row)];
        if (at != NOBODY && arrival_us(received[at]) <= now_us && !take_in(import))
            return;
    }
}

// The KV of a row of the plan; false: there is no room for it.
bool SimEngine::Parts::take_in(const Plan::Move &import) {
    const i32 request = running.request(import.row);
    const Received came = received[received_at[request]];
    const i64 tokens = came.handle.computed_tokens;
    Row &row = residents.add(came.handle.sent, came.handle.output_tokens);
    if (!residents.make_room(row, tokens + 1, running.reserved(import.row))) {
        residents.drop(request);
        return false;
    }
    row.computed = tokens;
    forget_received(request);
    if (came.transfer != NOBODY)
        network->forget(came.transfer);
    gone[request] = false;
    Event &imported = say(Event::imported);
    imported.request = request;
    imported.source = came.handle.source;
    imported.num_bytes = came.handle.num_bytes;
    imported.begin_us = came.handle.begin_us;
    imported.end_us = now_us;
    return true;
}

// Have its KV no longer be among what was received.
void SimEngine::Parts::forget_received(i32 request) {
    const i32 at = std::exchange(received_at[request], NOBODY);
    if (at == NOBODY)
        return;
    if (at + 1 < static_cast<i32>(received.size())) {
        received[at] = received.back();
        received_at[received[at].handle.request] = at;
    }
    received.pop_back();
}

// Whether KV may still arrive that the plan goes on with.
bool SimEngine::Parts::awaits() const {
    const Plan &plan = running.plan();
    for (const Plan::Move &import : plan.imports) {
        const auto is_its = [&](const Plan::Decode &decode) { return decode.row == import.row; };
        if (is_to_come(running.request(import.row)) &&
            std::any_of(plan.decodes.begin(), plan.decodes.end(), is_its))
            return true;
    }
    return false;
}

bool SimEngine::Parts::is_to_come(i32 request) const {
    const i32 at = received_at[request];
    if (at != NOBODY)
        return arrival_us(received[at]) > now_us;
    return !residents.find(request) && !gone[request];
}

// ---- SimEngine

SimEngine::SimEngine(const EngineSpec &spec, const std::vector<Request> &requests,
                     std::shared_ptr<Network> network)
    : parts_(std::make_unique<Parts>(spec, requests, std::move(network))) {}

SimEngine::~SimEngine() = default;

void SimEngine::submit(Plan plan, std::vector<Sent> requests) {
    parts_->inbox.emplace_back(Submitted{std::move(plan), std::move(requests)});
}

void SimEngine::receive(const Handle &handle) { parts_->inbox.emplace_back(handle); }

void SimEngine::cancel(i32 request) { parts_->inbox.emplace_back(request); }

std::vector<Event> SimEngine::poll(i64 now_us) { return parts_->poll(now_us); }

std::optional<i64> SimEngine::next_us(i64 now_us) const {
    const Parts &parts = *parts_;
    std::optional<i64> next_us;
    if (parts.is_computing)
        next_us = parts.stretch.ends_us.back();
    else if (!parts.inbox.empty())
        next_us = now_us;
    else if (parts.is_running)
        next_us = parts.next_arrival_us(parts.now_us + 1); // what is here already found no room
    if (parts.network && !parts.received.empty())
        if (const auto shared_us = parts.network->next_us())
            next_us = std::min(*shared_us, next_us.value_or(*shared_us));
    return next_us;
}

std::optional<i64> SimEngine::owed_since_us() const {
    if (!parts_->is_computing)
        return std::nullopt;
    return parts_->stretch.step_ends_us();
}

std::optional<i64> SimEngine::step_end_us(i64 now_us) const {
    if (!parts_->is_computing)
        return std::nullopt;
    return parts_->stretch.end_of_step_at(now_us);
}

i64 SimEngine::kv_blocks_used() const { return parts_->residents.used_blocks(); }

} // namespace sagec
