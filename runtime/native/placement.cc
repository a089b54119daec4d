// Where requests prefill and where they decode, with the arithmetic of runtime/direct/placement.py.
#include "placement.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace sagec {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double MINOR = 1e-3;       // of what decides between placements of the same makespan
constexpr i64 UNBOUNDED_STEPS = 256; // planned for a request that goes on until it stops

i64 capacity_tokens(const PlannedInstance &one) { return one.kv_blocks * one.block_tokens; }

i64 planned_steps(i64 tokens, bool is_bounded) {
    return is_bounded ? tokens : std::min(tokens, UNBOUNDED_STEPS);
}

// Tokens of KV with all output.
i64 need_of(const Fresh &row) { return row.prompt + (row.generate >= UNBOUNDED ? 0 : row.generate); }

// Leading tokens that an instance has of the row, where that may be of use: one that does not
// prefill goes on only where no more than the last token is to be computed.
i64 matched(const Fresh &row, const Cluster &cluster, i32 at) {
    if (!row.known)
        return 0;
    const i64 tokens = row.known[at];
    const auto &one = cluster.instances[at];
    const bool is_useful = one.prefills || (one.decodes && tokens == row.prompt - 1);
    return is_useful ? std::min(tokens, row.prompt - 1) : 0;
}

// Whether the row goes on at an instance that does not prefill.
bool returns_to(const Fresh &row, const Cluster &cluster, i32 at) {
    const bool is_said = row.on == at;
    const i64 there = std::max(is_said ? row.cached : 0, matched(row, cluster, at));
    return (there > 0 && there == row.prompt - row.computed - 1) || (is_said && row.computed > 0);
}

// Indices of the values, the smallest first; of equals the first.
void ascend(const std::vector<double> &values, std::vector<size_t> &order) {
    order.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
        size_t at = i;
        for (; at > 0 && values[i] < values[order[at - 1]]; --at)
            order[at] = order[at - 1];
        order[at] = i;
    }
}

size_t index_of(const std::vector<i32> &at, i32 instance) {
    return std::find(at.begin(), at.end(), instance) - at.begin();
}

} // namespace

Sites::Sites(const Cluster &cluster, std::vector<i32> returning) : returning(std::move(returning)) {
    for (i32 at = 0; at < i32(cluster.instances.size()); ++at) {
        const auto &extra = this->returning;
        if (cluster.instances[at].prefills || index_of(extra, at) < extra.size())
            prefill_at.push_back(at);
        if (cluster.instances[at].decodes)
            decode_at.push_back(at);
    }
    hops.resize(prefill_at.size() * decode_at.size());
    for (size_t p = 0; p < prefill_at.size(); ++p)
        for (size_t d = 0; d < decode_at.size(); ++d)
            hops[p * decode_at.size() + d].exists = prefill_at[p] == decode_at[d];
    for (const auto &path : cluster.paths)
        add_path(cluster, path);
    find_nearest();
}

void Sites::add_path(const Cluster &cluster, const Path &path) {
    const size_t p = index_of(prefill_at, path.source), d = index_of(decode_at, path.target);
    if (p == prefill_at.size() || d == decode_at.size())
        return;
    const double token_bytes = cluster.instances[path.source].kv_bytes_per_token;
    auto &hop = hops[p * decode_at.size() + d];
    hop.exists = hop.moves = true;
    hop.latency_us = path.latency_us;
    hop.us_per_token = 1e6 * token_bytes / path.bytes_per_s;
    for (const i32 link : path.links)
        hop.links.push_back({link, 1e6 * token_bytes / cluster.link_bytes_per_s[link]});
}

void Sites::find_nearest() {
    double latency_us = INF, us_per_token = INF;
    for (const auto &hop : hops) {
        if (!hop.exists)
            continue;
        if (!hop.moves) // KV may stay
            return;
        latency_us = std::min(latency_us, hop.latency_us);
        us_per_token = std::min(us_per_token, hop.us_per_token);
    }
    if (latency_us < INF) {
        nearest_latency_us_ = latency_us;
        nearest_us_per_token_ = us_per_token;
    }
}

Loads::Loads(const Cluster &cluster) : cluster_(cluster) {
    for (const auto &one : cluster.instances)
        alone_us_.push_back(one.cost.step_us(0, 0, 0, 0));
}

void Loads::begin(const Sites &sites, const std::vector<Resident> &residents) {
    const size_t count = cluster_.instances.size();
    sites_ = &sites;
    link_.assign(cluster_.link_bytes_per_s.size(), 0.0);
    tokens_.assign(count, 0.0);
    pairs_.assign(count, 0.0);
    time_.assign(count, 0.0);
    kv_.assign(count, 0.0);
    peak_us_ = 0.0;
    for (const auto &one : residents) {
        const i64 decodes = planned_steps(one.remaining, one.remaining < UNBOUNDED);
        tokens_[one.at] += double(decodes);
        pairs_[one.at] += (double(one.context) + double(decodes) * 0.5) * double(decodes);
    }
    if (residents.empty())
        return;
    for (size_t at = 0; at < count; ++at) {
        const auto &one = cluster_.instances[at];
        const double each = one.cost.decode_us(pairs_[at] / std::max(tokens_[at], 1.0));
        time_[at] = each * tokens_[at];
        kv_[at] = (alone_us_[at] + each) * pairs_[at] / double(capacity_tokens(one));
        peak_us_ = std::max({peak_us_, time_[at], kv_[at]});
    }
}

Loads::Pair Loads::place(const Fresh &row) {
    price(row);
    check_stuck();
    Pair pair;
    if (!find_only(pair))
        pair = choose();
    add(pair);
    return pair;
}

// problem_of and Problem.where, of one row.
void Loads::price(const Fresh &row) {
    const i64 need = need_of(row);
    const double decodes = double(planned_steps(row.generate - 1, row.generate < UNBOUNDED));
    const double context = double(row.prompt) + decodes / 2;
    moved_tokens_ = double(row.prompt);
    prefill_us_.clear();
    decode_us_.clear();
    kv_us_.clear();
    for (const i32 at : sites_->prefill_at) {
        const auto &one = cluster_.instances[at];
        const bool is_open = row.on == ANY || row.on == at;
        const bool may =
            is_open && row.prompt <= capacity_tokens(one) && (one.prefills || returns_to(row, cluster_, at));
        const i64 begin = row.computed + std::max(row.cached, matched(row, cluster_, at));
        prefill_us_.push_back(may ? one.cost.prefill_us(double(begin), double(row.prompt)) : INF);
    }
    for (const i32 at : sites_->decode_at) {
        const auto &one = cluster_.instances[at];
        const bool is_open = row.decode_on == ANY || row.decode_on == at;
        const bool may = is_open && need <= capacity_tokens(one);
        const double each = one.cost.decode_us(context);
        decode_us_.push_back(may ? each * decodes : INF);
        const double stay_us = (alone_us_[at] + each) * (context * decodes);
        kv_us_.push_back(stay_us / double(capacity_tokens(one)));
    }
}

void Loads::check_stuck() const {
    for (size_t p = 0; p < prefill_us_.size(); ++p)
        for (size_t d = 0; d < decode_us_.size(); ++d)
            if (prefill_us_[p] < INF && decode_us_[d] < INF && sites_->hop(p, d).exists)
                return;
    throw NotCovered("a row without a pair of instances");
}

// The pair of sites that the row may use, where there is one only.
bool Loads::find_only(Pair &pair) const {
    size_t prefills = 0, decodes = 0;
    for (size_t p = 0; p < prefill_us_.size(); ++p)
        if (prefill_us_[p] < INF && ++prefills)
            pair.prefill = p;
    for (size_t d = 0; d < decode_us_.size(); ++d)
        if (decode_us_[d] < INF && ++decodes)
            pair.decode = d;
    return prefills == 1 && decodes == 1;
}

void Loads::raise(double &load, double us) {
    load += us;
    peak_us_ = std::max(peak_us_, load);
}

void Loads::add(Pair pair) {
    const i32 here = sites_->prefill_at[pair.prefill], there = sites_->decode_at[pair.decode];
    const auto &hop = sites_->hop(pair.prefill, pair.decode);
    time_[here] += prefill_us_[pair.prefill];
    time_[there] += decode_us_[pair.decode];
    raise(kv_[there], kv_us_[pair.decode]);
    for (const auto &link : hop.links)
        raise(link_[link.link], moved_tokens_ * link.us_per_token);
    peak_us_ = std::max({peak_us_, time_[here], time_[there]});
}

// How long each site would be busy with the row too, and the sites in the order of that.
void Loads::find_ends() {
    prefill_.resize(prefill_us_.size());
    decode_.resize(decode_us_.size());
    for (size_t p = 0; p < prefill_.size(); ++p)
        prefill_[p] = time_[sites_->prefill_at[p]] + prefill_us_[p];
    for (size_t d = 0; d < decode_.size(); ++d) {
        const i32 at = sites_->decode_at[d];
        decode_[d] = std::max(time_[at] + decode_us_[d], kv_[at] + kv_us_[d]);
    }
    ascend(prefill_, by_prefill_);
    ascend(decode_, by_decode_);
}

// The pair that raises the makespan least; of equals the least loaded, then the nearest. Pairs are
// tried in the order of their load, and no more than can still be the best.
Loads::Pair Loads::choose() {
    find_ends();
    const double least = decode_[by_decode_[0]];
    const double shortest = *std::min_element(decode_us_.begin(), decode_us_.end());
    const double nearest_us = sites_->nearest_us(moved_tokens_);
    double best = INF;
    Pair chosen{};
    for (const size_t p : by_prefill_) {
        const double ahead = prefill_[p] + nearest_us;
        const double floor = std::max(ahead + shortest, peak_us_);
        if (std::max(least, floor) + MINOR * (ahead + least) >= best)
            break;
        for (const size_t d : by_decode_) {
            const double worst = std::max(decode_[d], floor);
            if (worst + MINOR * (ahead + decode_[d]) >= best)
                break;
            if (const double us = score({p, d}, worst); us < best) {
                best = us;
                chosen = {p, d};
            }
        }
    }
    return chosen;
}

// What a pair comes to, of which at least `worst` is known; infinite without a hop.
double Loads::score(Pair pair, double worst) const {
    const auto &hop = sites_->hop(pair.prefill, pair.decode);
    if (!hop.exists)
        return INF;
    double arrived = prefill_[pair.prefill];
    if (hop.moves) {
        arrived += hop.latency_us + hop.us_per_token * moved_tokens_;
        for (const auto &link : hop.links)
            worst = std::max(worst, link_[link.link] + moved_tokens_ * link.us_per_token);
    }
    const double done = arrived + decode_us_[pair.decode];
    return std::max(worst, done) + MINOR * (arrived + decode_[pair.decode]);
}

Placement::Placement(const Cluster &cluster) : cluster_(cluster), loads_(cluster) {
    size_t prefills = 0, decodes = 0;
    for (i32 at = 0; at < i32(cluster.instances.size()); ++at) {
        const auto &one = cluster.instances[at];
        if (one.prefills && ++prefills)
            only_prefill_ = at;
        if (one.decodes && ++decodes)
            only_decode_ = at;
    }
    all_prefill_ = prefills == cluster.instances.size();
    has_only_pair_ = prefills == 1 && decodes == 1;
}

void Placement::place(std::vector<Fresh> &rows, const std::vector<Resident> &residents) {
    if (rows.empty())
        return;
    find_returning(rows);
    if (returning_.empty() && has_only_pair_)
        for (auto &row : rows) {
            row.on = only_prefill_;
            row.decode_on = only_decode_;
        }
    if (!are_forced(rows))
        choose(rows, residents);
    for (auto &row : rows)
        row.cached = std::max(row.cached, matched(row, cluster_, row.on));
}

void Placement::find_returning(const std::vector<Fresh> &rows) {
    returning_.clear();
    if (all_prefill_)
        return;
    for (i32 at = 0; at < i32(cluster_.instances.size()); ++at) {
        if (cluster_.instances[at].prefills)
            continue;
        bool is_any = false;
        for (const auto &row : rows) {
            const bool returns = returns_to(row, cluster_, at);
            if (row.on == at && !returns)
                throw NotCovered("a row that is to prefill where only decodes are computed");
            is_any |= returns;
        }
        if (is_any)
            returning_.push_back(at);
    }
}

// Whether every row may be in one place only, by what was said, and surely fits there.
bool Placement::are_forced(const std::vector<Fresh> &rows) const {
    const auto &instances = cluster_.instances;
    return std::all_of(rows.begin(), rows.end(), [&](const Fresh &row) {
        return row.on != ANY && row.decode_on != ANY && row.prompt <= capacity_tokens(instances[row.on]) &&
               need_of(row) <= capacity_tokens(instances[row.decode_on]) &&
               (row.on == row.decode_on || cluster_.hand_overs[row.on * instances.size() + row.decode_on]);
    });
}

// Each row goes to the best pair for it as things stand; greedy in Python.
void Placement::choose(std::vector<Fresh> &rows, const std::vector<Resident> &residents) {
    const auto &found = sites();
    loads_.begin(found, residents);
    for (auto &row : rows) {
        const auto pair = loads_.place(row);
        row.on = found.prefill_at[pair.prefill];
        row.decode_on = found.decode_at[pair.decode];
    }
}

const Sites &Placement::sites() {
    for (const auto &one : known_sites_)
        if (one.returning == returning_)
            return one;
    return known_sites_.emplace_back(cluster_, returning_);
}

} // namespace sagec
