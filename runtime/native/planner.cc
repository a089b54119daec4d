// The direct planner: runtime/direct/planner.py, with what it has of waves.py, works.py and
// emitting.py. A decision of the strategy fifo asks for no instances, chunks, turns or modes.
#include "planner.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "packing.h"
#include "placement.h"

namespace sagec {

struct Planner::Parts {
    Parts(Cluster cluster, Mode mode, i64 chunk, i64 horizon);

    // What is asked.
    void read(const Round &round);
    void read_gone(const Round &round);
    void add_resident(const Running &row);
    void add_started(const Running &row);

    // The work of each instance.
    void share();
    void part();
    void share_prompt(i32 number);
    void share_resident(const Resident &one);
    void await_prompts();
    void send(i32 number);
    void check_room(const Work &work) const;
    void let_victims_go(const Work &work);
    void leave(i32 at, i32 request);

    // Plans.
    std::vector<Plan> plans(const Round &round);
    Plan plan_of(const Work &work);
    Plan common(i32 instance, i64 num_steps) const;
    void number_rows(const Work &work);
    void add_gone(Plan &plan) const;

    const Cluster cluster;
    const Mode mode;
    const i64 horizon;
    const bool has_both;
    i64 round = 0;
    Placement placement;
    Packing packing;
    std::vector<Resident> residents;
    std::vector<Fresh> fresh;           // prompts under way, then the admitted
    std::vector<char> leaves;           // of each running row
    std::vector<i32> victims;           // residents that leave for want of blocks
    std::vector<std::vector<i32>> gone; // requests that leave, by instance
    std::vector<i32> gone_from;         // these instances, in the order of the first that leaves
    bool any_waves = false, any_cross = false;
    std::vector<Work> works;
    std::vector<double> sent_bytes;  // over each link
    std::vector<const Path *> paths; // [source * instances + target]
    std::vector<Work *> computing;
    std::vector<i32> numbers; // in its plan, of each row of a work
};

namespace {

constexpr i64 MOST_HORIZON = 65536; // packing has a tally for each step

bool any_both(const Cluster &cluster) {
    return std::any_of(cluster.instances.begin(), cluster.instances.end(),
                       [](const PlannedInstance &one) { return one.prefills && one.decodes; });
}

void count_blocks(Work &work) {
    work.blocks = 0;
    for (auto &row : work.rows)
        work.blocks += row.blocks = row.blocks_for(row.decodes, work.about->block_tokens);
}

// Prompts that are under way were begun under a horizon that may have been shorter: where they need
// more blocks than there are, the last of them decode one token; within_its_room in Python.
void keep_within_room(Work &work) {
    i64 over = -work.about->kv_blocks;
    for (size_t at = 0; at < work.num_prefills; ++at)
        over += work.rows[at].is_started() ? work.rows[at].blocks : 0;
    for (size_t at = work.num_prefills; at-- > 0 && over > 0;) {
        auto &row = work.rows[at];
        if (!row.is_started())
            continue;
        row.decodes = std::min(row.decodes, i64(1));
        over -= row.blocks - row.blocks_for(row.decodes, work.about->block_tokens);
    }
    count_blocks(work);
}

// A request that goes on until it stops decodes no more than the instance has blocks for;
// bounded_by_its_room in Python.
void bound_by_room(Work &work) {
    const i64 room = work.about->kv_blocks * work.about->block_tokens;
    for (auto &row : work.rows)
        if (row.generate >= UNBOUNDED)
            row.decodes = std::min(row.decodes, std::max(room - row.prompt, i64(1)));
    count_blocks(work);
}

void fit(Work &work) {
    count_blocks(work);
    if (work.blocks <= work.about->kv_blocks)
        return;
    bound_by_room(work);
    keep_within_room(work);
}

} // namespace

Planner::Parts::Parts(Cluster given, Mode mode, i64 chunk, i64 horizon)
    : cluster(std::move(given)), mode(mode), horizon(horizon), has_both(any_both(cluster)),
      placement(cluster), packing(mode, chunk, horizon) {
    const size_t count = cluster.instances.size();
    gone.resize(count);
    works.resize(count);
    paths.resize(count * count);
    for (size_t at = 0; at < count; ++at) {
        works[at].instance = i32(at);
        works[at].about = &cluster.instances[at];
    }
    for (const auto &path : cluster.paths)
        paths[path.source * count + path.target] = &path;
}

// What is asked: waves.py

void Planner::Parts::read(const Round &asked) {
    round = asked.number;
    residents.clear();
    fresh.clear();
    read_gone(asked);
    for (size_t at = 0; at < asked.running.size(); ++at) {
        const auto &row = asked.running[at];
        if (leaves[at])
            continue;
        if (!row.arriving && row.computed_tokens < row.prompt_tokens)
            add_started(row);
        else
            add_resident(row);
    }
    any_waves = asked.any_waiting || !fresh.empty();
    for (const auto &row : asked.admitted) {
        fresh.emplace_back();
        fresh.back().request = row.request;
        fresh.back().prompt = row.prompt_tokens;
        fresh.back().generate = row.generate_tokens;
        fresh.back().known = row.cached;
    }
}

void Planner::Parts::read_gone(const Round &asked) {
    for (const i32 at : gone_from)
        gone[at].clear();
    gone_from.clear();
    leaves.assign(asked.running.size(), false);
    for (const i32 at : asked.preempted) {
        const auto &row = asked.running[at];
        leaves[at] = true;
        leave(row.instance, row.request);
    }
}

void Planner::Parts::leave(i32 at, i32 request) {
    if (gone[at].empty())
        gone_from.push_back(at);
    gone[at].push_back(request);
}

void Planner::Parts::add_resident(const Running &row) {
    const i64 context = row.arriving ? row.prompt_tokens : std::max(row.computed_tokens, i64(1));
    residents.push_back({row.request, row.instance, context, row.remaining_tokens, row.arriving});
}

// A prompt under way goes on where it is, before anything new.
void Planner::Parts::add_started(const Running &row) {
    Fresh one;
    one.request = row.request;
    one.prompt = row.prompt_tokens;
    one.computed = row.computed_tokens;
    one.cached = row.cached_tokens;
    one.generate = std::max(row.remaining_tokens, i64(1));
    one.on = row.instance;
    one.decode_on = cluster.instances[row.decode_on].decodes ? row.decode_on : ANY;
    fresh.push_back(one);
}

// The work of each instance: works.py

void Planner::Parts::share() {
    part();
    victims.clear();
    for (auto &work : works) {
        fit(work);
        check_room(work);
        if (work.blocks > work.about->kv_blocks)
            let_victims_go(work);
    }
    if (victims.empty())
        return;
    const auto is_victim = [&](const Resident &one) {
        return std::find(victims.begin(), victims.end(), one.request) != victims.end();
    };
    residents.erase(std::remove_if(residents.begin(), residents.end(), is_victim), residents.end());
    part();
    for (auto &work : works)
        fit(work);
}

void Planner::Parts::part() {
    for (auto &work : works) {
        work.rows.clear();
        work.num_prefills = 0;
    }
    any_cross = false;
    for (i32 number = 0; number < i32(fresh.size()); ++number)
        share_prompt(number);
    for (const auto &one : residents)
        share_resident(one);
    if (any_cross)
        await_prompts();
}

void Planner::Parts::share_prompt(i32 number) {
    const auto &row = fresh[number];
    if (row.computed + row.cached >= row.prompt)
        throw NotCovered("a prompt of which nothing is left to compute");
    auto &work = works[row.on];
    ++work.num_prefills;
    auto &here = work.rows.emplace_back();
    here.request = row.request;
    here.fresh = number;
    here.prompt = row.prompt;
    here.held = row.computed + row.cached;
    here.cached = row.cached;
    here.generate = row.generate;
    if (row.on == row.decode_on) {
        here.decodes = std::min(row.generate - 1, horizon);
    } else if (row.generate > 1) {
        here.target = row.decode_on;
        any_cross = true;
    }
}

void Planner::Parts::share_resident(const Resident &one) {
    auto &here = works[one.at].rows.emplace_back();
    here.request = one.request;
    here.source = one.arriving ? one.at : NOBODY;
    here.prompt = here.held = one.context;
    here.decodes = std::min(one.remaining, horizon);
    here.generate = one.remaining;
}

// Rows that decode elsewhere, there, and when they arrive: on a link the earlier rows go first.
void Planner::Parts::await_prompts() {
    sent_bytes.assign(cluster.link_bytes_per_s.size(), 0.0);
    for (i32 number = 0; number < i32(fresh.size()); ++number)
        if (fresh[number].on != fresh[number].decode_on && fresh[number].generate > 1)
            send(number);
}

void Planner::Parts::send(i32 number) {
    const auto &row = fresh[number];
    const size_t route = row.on * cluster.instances.size() + row.decode_on;
    if (!cluster.hand_overs[route] || !paths[route])
        throw NotCovered("a hand-over that may not be legal");
    const auto &path = *paths[route];
    const double size = double(row.prompt) * cluster.instances[row.on].kv_bytes_per_token;
    double us = path.latency_us + 1e6 * size / path.bytes_per_s;
    for (const i32 link : path.links) {
        double &sent = sent_bytes[link / 2]; // in both directions
        sent += size;
        us = std::max(us, path.latency_us + 1e6 * sent / cluster.link_bytes_per_s[link]);
    }
    auto &there = works[row.decode_on].rows.emplace_back();
    there.request = row.request;
    there.fresh = number;
    there.source = row.on;
    there.prompt = row.prompt;
    there.held = row.computed;
    there.decodes = std::min(row.generate - 1, horizon);
    there.generate = row.generate;
    there.transfer_us = i64(std::nearbyint(us));
}

void Planner::Parts::check_room(const Work &work) const {
    const i64 room = work.about->kv_blocks * work.about->block_tokens;
    for (const auto &row : work.rows) {
        const i64 output = row.generate >= UNBOUNDED ? row.decodes : row.generate;
        if (row.prompt + (row.decodes > 0 ? output : 0) > room)
            throw NotCovered("a request that no empty instance of its size could hold");
    }
}

// Of the rows that decode already, the last ones must leave, as many as it takes; victims_of in
// Python.
void Planner::Parts::let_victims_go(const Work &work) {
    i64 room = work.about->kv_blocks;
    for (const auto &row : work.rows)
        room -= row.is_started() ? row.blocks : 0;
    for (const auto &row : work.rows) {
        if (row.is_awaited() || row.held < row.prompt)
            continue;
        room -= row.blocks;
        if (room < 0) {
            victims.push_back(row.request);
            leave(work.instance, row.request);
        }
    }
}

// Plans: emitting.py

// Plans of prompts, then those of decodes alone, and last of instances that only drop rows; none of
// nothing for an instance that is at no plan.
std::vector<Plan> Planner::Parts::plans(const Round &asked) {
    computing.clear();
    for (const bool prefills : {true, false})
        for (auto &work : works)
            if (!work.rows.empty() && (work.num_prefills > 0) == prefills)
                computing.push_back(&work);
    packing.pack(computing, fresh.size(), any_cross);
    std::vector<Plan> found;
    found.reserve(computing.size() + gone_from.size());
    for (const auto *work : computing) {
        if (work->exceeds_room)
            throw NotCovered("steps beyond a budget");
        if (work->num_steps || !gone[work->instance].empty() || !asked.idle[work->instance])
            found.push_back(plan_of(*work));
    }
    for (const i32 at : gone_from)
        if (works[at].rows.empty()) {
            found.push_back(common(at, 0));
            add_gone(found.back());
        }
    return found;
}

Plan Planner::Parts::common(i32 instance, i64 num_steps) const {
    Plan plan;
    plan.round = round;
    plan.instance = instance;
    plan.mixes_phases = mode != Mode::time_share;
    plan.num_steps = i32(num_steps);
    plan.max_step_tokens = cluster.instances[instance].max_step_tokens;
    return plan;
}

// Rows that got nothing within the horizon are left out.
Plan Planner::Parts::plan_of(const Work &work) {
    Plan plan = common(work.instance, work.num_steps);
    number_rows(work);
    const size_t count = work.rows.size() + gone[work.instance].size();
    plan.requests.reserve(count);
    plan.kv_blocks.reserve(count);
    plan.decodes.reserve(work.rows.size());
    plan.chunks = work.chunks;
    for (auto &chunk : plan.chunks)
        chunk.row = numbers[chunk.row];
    for (size_t at = 0; at < work.rows.size(); ++at) {
        const auto &row = work.rows[at];
        const i32 number = numbers[at];
        if (number == NOBODY)
            continue;
        plan.requests.push_back(row.request);
        plan.kv_blocks.push_back(row.blocks);
        if (row.until)
            plan.decodes.push_back({number, i32(row.begin), row.until});
        if (row.source != NOBODY)
            plan.imports.push_back({number, row.source});
        if (row.target != NOBODY)
            plan.exports.push_back({number, row.target});
    }
    add_gone(plan);
    return plan;
}

void Planner::Parts::number_rows(const Work &work) {
    numbers.assign(work.rows.size(), NOBODY);
    for (const auto &chunk : work.chunks)
        numbers[chunk.row] = 0;
    i32 next = 0;
    for (size_t at = 0; at < work.rows.size(); ++at)
        if (numbers[at] != NOBODY || work.rows[at].until > 0 || work.rows[at].comes)
            numbers[at] = next++;
}

// Those that leave are the rows behind all others.
void Planner::Parts::add_gone(Plan &plan) const {
    for (const i32 request : gone[plan.instance]) {
        plan.preemptions.push_back(i32(plan.requests.size()));
        plan.requests.push_back(request);
        plan.kv_blocks.push_back(0);
    }
}

Planner::Planner(Cluster cluster, Mode mode, i64 chunk, i64 horizon) {
    if (horizon < 1)
        throw NotCovered("plans without a horizon");
    if (horizon > MOST_HORIZON)
        throw NotCovered("a horizon of more than " + std::to_string(MOST_HORIZON) + " steps");
    parts_ = std::make_unique<Parts>(std::move(cluster), mode, chunk, horizon);
}

Planner::~Planner() = default;

std::vector<Plan> Planner::plan(const Round &round) {
    auto &parts = *parts_;
    parts.read(round);
    if (parts.any_waves && parts.mode == Mode::strict && parts.has_both)
        throw NotCovered("a strict round, and an instance of both roles");
    parts.placement.place(parts.fresh, parts.residents);
    parts.share();
    return parts.plans(round);
}

} // namespace sagec
