// The simulated instance (runtime/engines/sim) and what such instances share.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "cost.h"
#include "types.h"

namespace sagec {

// Links with max-min fair shares; runtime/engines/sim/network.py.
class Network;

struct Route {
    i32 source = NOBODY, target = NOBODY;
    double latency_us = 0;
    std::vector<i32> links;
};

std::shared_ptr<Network> make_network(std::vector<double> link_bytes_per_s, std::vector<Route> routes);

// Instances whose KV may arrive at another time than when this was asked last, in order.
std::vector<i32> take_concerned(Network &network);

// round_us: a plan that was heard of begins so much later.
struct EngineSpec {
    i32 id = 0;
    i64 kv_blocks = 0, block_tokens = 1;
    bool caches = false; // by LRU
    double link_bytes_per_s = 2.5e10, link_latency_us = 20.0;
    i64 round_us = 0;
    StepCost cost;
};

class SimEngine {
  public:
    // requests: of the whole run, by number; they outlive the engine.
    SimEngine(const EngineSpec &spec, const std::vector<Request> &requests, std::shared_ptr<Network> network);
    ~SimEngine();

    void submit(Plan plan, std::vector<Sent> requests);
    void receive(const Handle &handle);
    void cancel(i32 request);
    std::vector<Event> poll(i64 now_us);

    std::optional<i64> next_us(i64 now_us) const;
    std::optional<i64> owed_since_us() const;
    std::optional<i64> step_end_us(i64 now_us) const;
    i64 kv_blocks_used() const;

  private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

} // namespace sagec
