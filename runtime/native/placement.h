// Where requests prefill and where they decode: runtime/direct/places.py, and what rounds need of
// runtime/direct/placement.py.
#pragma once

#include <vector>

#include "planner.h"

namespace sagec {

constexpr i32 ANY = NOBODY; // an instance that nobody has chosen

// Who decodes already, or will when its KV has arrived; a row of Residents in
// runtime/direct/waves.py.
struct Resident {
    i32 request = NOBODY, at = NOBODY;
    i64 context = 0, remaining = 0;
    bool arriving = false;
};

// Whose prompt is to be computed; a row of Fresh in runtime/direct/places.py. known: of each
// instance, the leading tokens that it has; nullptr: none has any.
struct Fresh {
    i32 request = NOBODY;
    i64 prompt = 0, computed = 0, cached = 0, generate = 0;
    i32 on = ANY, decode_on = ANY;
    const i64 *known = nullptr;
};

// The instances that prefill and those that decode, and the hops between them; Sites in Python.
struct Sites {
    struct Passed {
        i64 link;
        double us_per_token;
    };
    struct Hop {
        bool exists = false, moves = false;
        double latency_us = 0, us_per_token = 0;
        std::vector<Passed> links;
    };
    std::vector<i32> returning; // as in Placement
    std::vector<i32> prefill_at, decode_at;
    std::vector<Hop> hops; // [prefill_at, decode_at]

    Sites(const Cluster &cluster, std::vector<i32> returning);
    const Hop &hop(size_t prefill, size_t decode) const { return hops[prefill * decode_at.size() + decode]; }
    // The least that moving so many tokens takes.
    double nearest_us(double tokens) const { return nearest_latency_us_ + nearest_us_per_token_ * tokens; }

  private:
    void add_path(const Cluster &cluster, const Path &path);
    void find_nearest();

    double nearest_latency_us_ = 0, nearest_us_per_token_ = 0;
};

// What every instance and link has to do, while rows come; Loads in Python.
class Loads {
  public:
    struct Pair {
        size_t prefill, decode;
    }; // indices of sites

    explicit Loads(const Cluster &cluster);
    // Only with what residents have to do.
    void begin(const Sites &sites, const std::vector<Resident> &residents);
    // The best pair for a row as things stand, and the row is added to it. Throws NotCovered where
    // there is none.
    Pair place(const Fresh &row);

  private:
    void price(const Fresh &row);
    bool find_only(Pair &pair) const;
    void check_stuck() const;
    void find_ends();
    Pair choose();
    double score(Pair pair, double worst) const;
    void add(Pair pair);
    void raise(double &load, double us);

    const Cluster &cluster_;
    const Sites *sites_ = nullptr;
    std::vector<double> alone_us_;         // of each instance, a step of nobody
    std::vector<double> time_, kv_, link_; // what is to be done already
    std::vector<double> tokens_, pairs_;   // of residents, at each instance
    // Of a row, at each site: what it takes, infinite where the row may not be; how long the site
    // would be busy with it; and the sites in the order of that.
    std::vector<double> prefill_us_, decode_us_, kv_us_;
    std::vector<double> prefill_, decode_;
    std::vector<size_t> by_prefill_, by_decode_;
    double moved_tokens_ = 0, peak_us_ = 0;
};

class Placement {
  public:
    explicit Placement(const Cluster &cluster);

    // Says of each row where it is computed and decodes, and what it reuses. Throws NotCovered.
    void place(std::vector<Fresh> &rows, const std::vector<Resident> &residents);

  private:
    void find_returning(const std::vector<Fresh> &rows);
    bool are_forced(const std::vector<Fresh> &rows) const;
    void choose(std::vector<Fresh> &rows, const std::vector<Resident> &residents);
    const Sites &sites();

    const Cluster &cluster_;
    bool all_prefill_ = true, has_only_pair_ = false;
    i32 only_prefill_ = ANY, only_decode_ = ANY; // where rows have no choice
    std::vector<i32> returning_; // instances that do not prefill, where rows go on all the same
    std::vector<Sites> known_sites_;
    Loads loads_;
};

} // namespace sagec
