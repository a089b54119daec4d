// A run from its columns, and what came of it as columns.
#include "simulation.h"

#include <string>
#include <utility>

namespace sagec {

namespace {

// A list of floats read from its beginning on.
class Reader {
  public:
    explicit Reader(std::vector<double> values) : values_(std::move(values)) {}

    double one() { return values_.at(at_++); }
    std::vector<double> list(std::size_t count) {
        std::vector<double> found;
        for (std::size_t i = 0; i < count; ++i)
            found.push_back(one());
        return found;
    }

  private:
    std::vector<double> values_;
    std::size_t at_ = 0;
};

Curve read_curve(Reader &reader) {
    const auto pieces = static_cast<std::size_t>(reader.one());
    const double begin_us = reader.one();
    std::vector<double> knots = reader.list(pieces);
    return Curve::of(begin_us, std::move(knots), reader.list(pieces));
}

Fit read_fit(std::vector<double> values) {
    Reader reader(std::move(values));
    Fit fit;
    fit.pair_us = reader.one();
    fit.context_us = reader.one();
    fit.shared_us = reader.one();
    fit.prefill = read_curve(reader);
    fit.decode = read_curve(reader);
    return fit;
}

// The costs of all instances, whose columns begin with `prefix`.
std::vector<StepCost> read_costs(const Columns &told, const std::string &prefix, std::size_t count) {
    std::vector<StepCost> costs(count);
    const auto set = [&](const std::string &name, double StepCost::*field) {
        const std::vector<double> &column = told.floats(prefix + name);
        for (std::size_t at = 0; at < count; ++at)
            costs[at].*field = column.at(at);
    };
    set("flops_per_token", &StepCost::flops_per_token);
    set("flops_per_pair", &StepCost::flops_per_pair);
    set("weight_bytes", &StepCost::weight_bytes);
    set("kv_bytes_per_token", &StepCost::kv_bytes_per_token);
    set("flops_per_s", &StepCost::flops_per_s);
    set("bytes_per_s", &StepCost::bytes_per_s);
    set("overhead_us", &StepCost::overhead_us);
    set("head_flops_per_token", &StepCost::head_flops_per_token);
    set("expert_bytes", &StepCost::expert_bytes);
    set("experts", &StepCost::experts);
    set("experts_per_token", &StepCost::experts_per_token);
    for (std::size_t at = 0; at < count; ++at) {
        std::vector<double> fit = told.floats_of(prefix + "fit", at);
        costs[at].has_fit = !fit.empty();
        if (costs[at].has_fit)
            costs[at].fit = read_fit(std::move(fit));
        costs[at].prepare();
    }
    return costs;
}

std::vector<Member> read_members(const Columns &told) {
    std::vector<Member> members;
    for (std::size_t at = 0; at < told.ints("prefills").size(); ++at) {
        members.push_back({told.ints("prefills")[at] != 0, told.ints("decodes").at(at) != 0,
                           told.ints("kv_blocks").at(at), told.ints("block_tokens").at(at)});
    }
    return members;
}

std::vector<EngineSpec> read_specs(const Columns &told, const std::vector<Member> &members) {
    const std::vector<StepCost> costs = read_costs(told, "engine.", members.size());
    std::vector<EngineSpec> specs;
    for (std::size_t at = 0; at < members.size(); ++at) {
        EngineSpec spec;
        spec.id = static_cast<i32>(at);
        spec.kv_blocks = members[at].kv_blocks;
        spec.block_tokens = members[at].block_tokens;
        spec.caches = told.ints("caches").at(at) != 0;
        spec.link_bytes_per_s = told.floats("link_bytes_per_s").at(at);
        spec.link_latency_us = told.floats("link_latency_us").at(at);
        spec.round_us = told.ints("round_us").at(at);
        spec.cost = costs[at];
        specs.push_back(std::move(spec));
    }
    return specs;
}

// The links of each row of a table of ways, by number.
std::vector<i32> links_of(const Columns &told, const std::string &name, std::size_t row) {
    const std::vector<i64> links = told.ints_of(name + ".links", row);
    return {links.begin(), links.end()};
}

std::shared_ptr<Network> read_network(const Columns &told) {
    std::vector<Route> routes;
    for (std::size_t row = 0; row < told.ints("routes.source").size(); ++row) {
        routes.push_back({static_cast<i32>(told.ints("routes.source")[row]),
                          static_cast<i32>(told.ints("routes.target").at(row)),
                          told.floats("routes.latency_us").at(row), links_of(told, "routes", row)});
    }
    return make_network(told.floats("network.bytes_per_s"), std::move(routes));
}

std::vector<PlannedInstance> read_planned(const Columns &told, const std::vector<Member> &members) {
    const std::vector<StepCost> costs = read_costs(told, "planned.", members.size());
    std::vector<PlannedInstance> planned;
    for (std::size_t at = 0; at < members.size(); ++at) {
        PlannedInstance one;
        one.prefills = members[at].prefills;
        one.decodes = members[at].decodes;
        one.kv_blocks = members[at].kv_blocks;
        one.block_tokens = members[at].block_tokens;
        one.max_batch = told.ints("max_batch").at(at);
        one.max_step_tokens = told.ints("max_step_tokens").at(at);
        one.max_partial_prefills = told.ints("max_partial_prefills").at(at);
        one.kv_bytes_per_token = told.floats("kv_bytes_per_token").at(at);
        one.cost = costs[at];
        planned.push_back(std::move(one));
    }
    return planned;
}

Cluster read_cluster(const Columns &told, const std::vector<Member> &members) {
    Cluster cluster;
    cluster.instances = read_planned(told, members);
    cluster.link_bytes_per_s = told.floats("links.bytes_per_s");
    const std::vector<i64> &hand_overs = told.ints("hand_overs");
    cluster.hand_overs.assign(hand_overs.begin(), hand_overs.end());
    for (std::size_t row = 0; row < told.ints("paths.source").size(); ++row) {
        Path path;
        path.source = static_cast<i32>(told.ints("paths.source")[row]);
        path.target = static_cast<i32>(told.ints("paths.target").at(row));
        path.latency_us = told.floats("paths.latency_us").at(row);
        path.bytes_per_s = told.floats("paths.bytes_per_s").at(row);
        path.links = links_of(told, "paths", row);
        cluster.paths.push_back(std::move(path));
    }
    return cluster;
}

std::vector<Request> read_requests(const Columns &told, const std::vector<i64> &hashes) {
    const std::vector<i64> &begins = told.ints("hashes.at");
    std::vector<Request> requests(told.ints("prompt_tokens").size());
    for (std::size_t at = 0; at < requests.size(); ++at) {
        Request &request = requests[at];
        request.prompt_tokens = told.ints("prompt_tokens")[at];
        request.max_output_tokens = told.ints("max_output_tokens").at(at);
        request.arrival_us = told.ints("arrival_us").at(at);
        request.hashes = hashes.data() + begins.at(at);
        request.num_hashes = begins.at(at + 1) - begins.at(at);
        request.hashes_given = told.ints("hashes_given").at(at) != 0;
    }
    return requests;
}

// Throws NotCovered unless every block stands behind the same block in all prompts. They may be
// those of made-up hashes, of which caches keep only what makes sense.
void check_blocks(const std::vector<Request> &requests, i64 blocks) {
    std::vector<i64> before(blocks, -2); // -1: it is the first of its prompts
    for (const Request &request : requests) {
        i64 last = -1;
        for (i64 at = 0; at < request.num_hashes; ++at) {
            const i64 block = request.hashes[at];
            if (before[block] != -2 && before[block] != last) {
                throw NotCovered("block hashes of which one stands behind several others");
            }
            before[block] = last;
            last = block;
        }
    }
}

// Block size of each instance that prefills with a prefix cache, 0 for the others.
std::vector<i64> caching(const Columns &told, const std::vector<Member> &members) {
    std::vector<i64> block_tokens;
    for (std::size_t at = 0; at < members.size(); ++at) {
        const bool looks = members[at].prefills && told.ints("caches").at(at);
        block_tokens.push_back(looks ? members[at].block_tokens : 0);
    }
    return block_tokens;
}

void put_ended(const Loop &loop, Columns &result) {
    std::vector<i64> request, ending, end_us, ran_on, begins = {0};
    for (const Ended &ended : loop.ended()) {
        request.push_back(ended.request);
        ending.push_back(static_cast<i64>(ended.ending));
        end_us.push_back(ended.end_us);
        const std::vector<i32> &places = loop.table()[ended.request].ran_on;
        ran_on.insert(ran_on.end(), places.begin(), places.end());
        begins.push_back(static_cast<i64>(ran_on.size()));
    }
    const auto put = [&](const std::string &name, i64 Serving::*field) {
        const auto value_of = [&](const Ended &one) { return loop.table()[one.request].*field; };
        result.put(name, column_of(loop.ended(), value_of));
    };
    put("prompt_tokens", &Serving::prompt_tokens);
    put("remaining_tokens", &Serving::remaining_tokens);
    put("output_tokens", &Serving::output_tokens);
    put("reused_tokens", &Serving::reused_tokens);
    put("preemptions", &Serving::preemptions);
    put("admitted_us", &Serving::admitted_us);
    put("first_token_us", &Serving::first_token_us);
    put("last_token_us", &Serving::last_token_us);
    result.put("request", std::move(request));
    result.put("ending", std::move(ending));
    result.put("end_us", std::move(end_us));
    result.put("ran_on", std::move(ran_on));
    result.put("ran_on.at", std::move(begins));
}

void put_uses(const Meter &meter, Columns &result) {
    const auto put = [&](const std::string &name, i64 InstanceUse::*field) {
        const auto value_of = [&](const InstanceUse &use) { return use.*field; };
        result.put("uses." + name, column_of(meter.uses, value_of));
    };
    put("busy_us", &InstanceUse::busy_us);
    put("steps", &InstanceUse::steps);
    put("prompt_tokens", &InstanceUse::prompt_tokens);
    put("decode_tokens", &InstanceUse::decode_tokens);
    put("sampled_tokens", &InstanceUse::sampled_tokens);
    put("reused_tokens", &InstanceUse::reused_tokens);
    put("sent_bytes", &InstanceUse::sent_bytes);
    std::vector<double> pairs;
    for (const InstanceUse &use : meter.uses)
        pairs.push_back(use.pairs);
    result.put("uses.pairs", std::move(pairs));
}

void put_series(const Meter &meter, Columns &result) {
    result.put("rounds.us", meter.rounds_us);
    result.put("rounds.waiting", meter.waiting);
    result.put("rounds.running", meter.running);
    result.put("reports.instance", meter.report_instances);
    result.put("reports.end_us", meter.report_ends_us);
    result.put("reports.kv_blocks", meter.report_kv_blocks);
    result.put("moves.request", meter.moved);
    result.put("moves.source", meter.move_sources);
    result.put("moves.target", meter.move_targets);
    result.put("moves.bytes", meter.move_bytes);
    result.put("moves.begin_us", meter.move_begins_us);
    result.put("moves.end_us", meter.move_ends_us);
}

std::vector<Plan::Move> read_moves(const Columns &told, const std::string &name, std::size_t plan) {
    const std::vector<i64> rows = told.ints_of(name + ".row", plan);
    const std::vector<i64> peers = told.ints_of(name + ".peer", plan);
    std::vector<Plan::Move> moves;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        moves.push_back({static_cast<i32>(rows[i]), static_cast<i32>(peers.at(i))});
    }
    return moves;
}

Plan read_plan(const Columns &told, std::size_t at) {
    const auto ints = [&](const std::string &name) { return told.ints_of("plans." + name, at); };
    Plan plan;
    plan.round = told.one("plans.round");
    plan.instance = static_cast<i32>(told.ints("plans.instance").at(at));
    plan.mixes_phases = told.ints("plans.mixes_phases").at(at) != 0;
    plan.num_steps = static_cast<i32>(told.ints("plans.num_steps").at(at));
    plan.max_step_tokens = told.ints("plans.max_step_tokens").at(at);
    for (const i64 request : ints("requests"))
        plan.requests.push_back(static_cast<i32>(request));
    for (const i64 row : ints("preemptions"))
        plan.preemptions.push_back(static_cast<i32>(row));
    plan.kv_blocks = ints("kv_blocks");
    const auto step = ints("chunks.step"), chunk = ints("chunks.row");
    const auto begin = ints("chunks.begin"), end = ints("chunks.end");
    for (std::size_t i = 0; i < step.size(); ++i) {
        const auto row = static_cast<i32>(chunk[i]);
        plan.chunks.push_back({static_cast<i32>(step[i]), row, begin[i], end[i]});
    }
    const auto decode = ints("decodes.row"), first = ints("decodes.begin_step");
    const auto until = ints("decodes.until_tokens");
    for (std::size_t i = 0; i < decode.size(); ++i) {
        plan.decodes.push_back({static_cast<i32>(decode[i]), static_cast<i32>(first[i]), until[i]});
    }
    plan.imports = read_moves(told, "plans.imports", at);
    plan.exports = read_moves(told, "plans.exports", at);
    return plan;
}

} // namespace

std::vector<Plan> read_plans(const Columns &told) {
    std::vector<Plan> plans;
    for (std::size_t at = 0; at < told.ints("plans.instance").size(); ++at) {
        plans.push_back(read_plan(told, at));
    }
    return plans;
}

Simulation::Simulation(const Columns &told, Directory::BlocksOf blocks_of, Loop::PlanElsewhere plan_elsewhere)
    : hashes_(told.ints("hashes")), requests_(read_requests(told, hashes_)) {
    const std::vector<Member> members = read_members(told);
    const std::vector<i64> &refused = told.ints("refused");
    refused_.assign(refused.begin(), refused.end());
    check_blocks(requests_, told.one("blocks"));
    planner_ = std::make_unique<Planner>(read_cluster(told, members), static_cast<Mode>(told.one("mode")),
                                         told.one("chunk"), told.one("horizon"));
    Directory directory(requests_, caching(told, members), told.one("blocks"), std::move(blocks_of));
    executor_ = std::make_unique<Executor>(members, read_specs(told, members), requests_, refused_,
                                           std::move(directory), read_network(told), *planner_,
                                           std::move(plan_elsewhere));
}

Columns Simulation::result() const {
    Columns result;
    put_ended(executor_->loop(), result);
    put_uses(executor_->meter(), result);
    put_series(executor_->meter(), result);
    result.put("now_us", std::vector<i64>{executor_->now_us()});
    return result;
}

} // namespace sagec
