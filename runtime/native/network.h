// Links that the simulated instances of one run share: runtime/engines/sim/network.py.
#pragma once

#include <optional>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "types.h"

namespace sagec {

// What names a transfer: who sends it, the request, and when it began.
struct TransferKey {
    i32 source = NOBODY, request = NOBODY;
    i64 begin_us = 0;

    bool operator==(const TransferKey &other) const {
        return source == other.source && request == other.request && begin_us == other.begin_us;
    }
};

struct TransferKeyHash {
    std::size_t operator()(const TransferKey &key) const {
        const auto who = (static_cast<std::uint64_t>(key.source) << 32) ^ key.request;
        return (who ^ (static_cast<std::uint64_t>(key.begin_us) << 20)) * 0x9e3779b97f4a7c15ull;
    }
};

class Network {
  public:
    // Throws NotCovered for a route over a link that there is not.
    Network(std::vector<double> link_bytes_per_s, std::vector<Route> routes);

    // The last two are of a line of its own, where there is no route.
    void begin(const TransferKey &key, i32 target, i64 num_bytes, double bytes_per_s, double latency_us);
    void settle(i64 now_us);      // let time pass
    std::optional<i64> next_us(); // when the next transfer ends, so that others go faster

    i32 find(const TransferKey &key) const; // a transfer's number; NOBODY: it was not begun here
    i64 arrival_us(i32 transfer) const;     // as things stand
    void forget(i32 transfer);              // nobody will ask for it again

    i64 changes() const { return changes_; } // grows when a transfer begins or ends
    std::vector<i32> take_concerned();

  private:
    // limit: beyond which it does not go, whoever else does. arrival_us: once it has left.
    struct Transfer {
        TransferKey key;
        i32 target = NOBODY;
        bool is_moving = false;
        const std::vector<i32> *links = nullptr;
        double latency_us = 0, left_bytes = 0, limit_bytes_per_s = 0, bytes_per_s = 0;
        i64 arrival_us = 0;
    };

    i32 enter(const TransferKey &key);
    const Route *route(i32 source, i32 target) const;
    double end_us(const Transfer &transfer) const;
    double first_end_us();
    void end_those_at(double end_us);
    void pass(double until_us);
    void share();
    void count_users();
    std::pair<double, i32> tightest() const;
    void give(double part, i32 link);
    void concern(i32 instance);

    std::vector<double> link_bytes_per_s_;
    std::vector<Route> routes_;
    i32 num_instances_ = 0;
    std::vector<i32> route_of_; // by source and target
    std::vector<Transfer> transfers_;
    std::unordered_map<TransferKey, i32, TransferKeyHash> numbers_;
    std::vector<i32> unused_, moving_; // moving: in the order in which they began
    double now_us_ = 0;
    std::optional<double> first_end_us_; // of those moving, where nothing changed since
    i64 changes_ = 0;
    std::vector<i32> concerned_;
    std::vector<char> is_concerned_; // by instance

    // While parts are given: what links have left, those in use, and who waits.
    std::vector<double> left_;
    std::vector<i32> users_, used_, waiting_, settled_;
};

} // namespace sagec
