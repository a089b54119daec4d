// Who moves KV at once gets a part of each link; see runtime/engines/sim/network.py.
#include "network.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace sagec {

namespace {

constexpr double NO_LIMIT = std::numeric_limits<double>::infinity();
const std::vector<i32> NO_LINKS;

} // namespace

std::shared_ptr<Network> make_network(std::vector<double> link_bytes_per_s, std::vector<Route> routes) {
    return std::make_shared<Network>(std::move(link_bytes_per_s), std::move(routes));
}

std::vector<i32> take_concerned(Network &network) { return network.take_concerned(); }

Network::Network(std::vector<double> link_bytes_per_s, std::vector<Route> routes)
    : link_bytes_per_s_(std::move(link_bytes_per_s)), routes_(std::move(routes)),
      left_(link_bytes_per_s_.size()), users_(link_bytes_per_s_.size()) {
    const i32 num_links = static_cast<i32>(link_bytes_per_s_.size());
    for (const Route &route : routes_) {
        num_instances_ = std::max({num_instances_, route.source + 1, route.target + 1});
        for (const i32 link : route.links)
            if (link < 0 || link >= num_links)
                throw NotCovered("a route over link " + std::to_string(link) + " of " +
                                 std::to_string(num_links));
    }
    route_of_.assign(static_cast<std::size_t>(num_instances_) * num_instances_, NOBODY);
    for (std::size_t i = 0; i < routes_.size(); ++i)
        route_of_[routes_[i].source * num_instances_ + routes_[i].target] = static_cast<i32>(i);
}

const Route *Network::route(i32 source, i32 target) const {
    if (source >= num_instances_ || target >= num_instances_)
        return nullptr;
    const i32 number = route_of_[source * num_instances_ + target];
    return number == NOBODY ? nullptr : &routes_[number];
}

void Network::begin(const TransferKey &key, i32 target, i64 num_bytes, double bytes_per_s,
                    double latency_us) {
    settle(key.begin_us);
    const Route *way = route(key.source, target);
    const i32 number = enter(key);
    Transfer &transfer = transfers_[number];
    transfer.target = target;
    transfer.links = way ? &way->links : &NO_LINKS;
    transfer.latency_us = way ? way->latency_us : latency_us;
    transfer.left_bytes = static_cast<double>(num_bytes);
    transfer.limit_bytes_per_s = transfer.links->empty() ? bytes_per_s : NO_LIMIT;
    transfer.is_moving = num_bytes != 0;
    transfer.arrival_us = key.begin_us + std::llrint(transfer.latency_us);
    if (!transfer.is_moving)
        return;
    moving_.push_back(number);
    share();
}

i32 Network::enter(const TransferKey &key) {
    if (unused_.empty()) {
        unused_.push_back(static_cast<i32>(transfers_.size()));
        transfers_.emplace_back();
    }
    const i32 number = unused_.back();
    if (!numbers_.emplace(key, number).second)
        throw NotCovered("two transfers of one request from one instance at one time");
    unused_.pop_back();
    transfers_[number].key = key;
    return number;
}

void Network::settle(i64 now_us) {
    const double now = static_cast<double>(now_us);
    while (!moving_.empty() && now_us_ < now) {
        const double first = first_end_us();
        if (first > now)
            break;
        end_those_at(first);
        share();
    }
    pass(now);
}

// Times as they were thought before the last bytes move.
void Network::end_those_at(double first_us) {
    settled_.clear();
    for (const i32 number : moving_)
        if (end_us(transfers_[number]) == first_us)
            settled_.push_back(number);
    pass(first_us);
    for (const i32 number : settled_) {
        Transfer &transfer = transfers_[number];
        const double took_us = first_us - transfer.key.begin_us + transfer.latency_us;
        transfer.arrival_us = transfer.key.begin_us + std::llrint(took_us);
        transfer.is_moving = false;
    }
    const auto has_left = [this](i32 number) { return !transfers_[number].is_moving; };
    moving_.erase(std::remove_if(moving_.begin(), moving_.end(), has_left), moving_.end());
}

std::optional<i64> Network::next_us() {
    if (moving_.empty())
        return std::nullopt;
    return static_cast<i64>(std::ceil(first_end_us()));
}

i32 Network::find(const TransferKey &key) const {
    const auto found = numbers_.find(key);
    return found == numbers_.end() ? NOBODY : found->second;
}

i64 Network::arrival_us(i32 number) const {
    const Transfer &transfer = transfers_[number];
    if (!transfer.is_moving)
        return transfer.arrival_us;
    const i64 begin_us = transfer.key.begin_us;
    return begin_us + std::llrint(end_us(transfer) - begin_us + transfer.latency_us);
}

void Network::forget(i32 number) {
    Transfer &transfer = transfers_[number];
    numbers_.erase(transfer.key);
    unused_.push_back(number);
    if (!transfer.is_moving)
        return;
    transfer.is_moving = false;
    moving_.erase(std::find(moving_.begin(), moving_.end(), number));
    share();
}

std::vector<i32> Network::take_concerned() {
    for (const i32 instance : concerned_)
        is_concerned_[instance] = false;
    return std::exchange(concerned_, {});
}

void Network::concern(i32 instance) {
    if (instance >= static_cast<i32>(is_concerned_.size()))
        is_concerned_.resize(instance + 1);
    if (!is_concerned_[instance])
        concerned_.push_back(instance);
    is_concerned_[instance] = true;
}

// When the last byte leaves if nobody comes or goes.
double Network::end_us(const Transfer &transfer) const {
    return now_us_ + 1e6 * transfer.left_bytes / transfer.bytes_per_s;
}

double Network::first_end_us() {
    if (!first_end_us_) {
        double first = NO_LIMIT;
        for (const i32 number : moving_)
            first = std::min(first, end_us(transfers_[number]));
        first_end_us_ = first;
    }
    return *first_end_us_;
}

// Move bytes at the present shares.
void Network::pass(double until_us) {
    const double passed_us = until_us - now_us_;
    if (passed_us <= 0)
        return;
    now_us_ = until_us;
    first_end_us_.reset();
    for (const i32 number : moving_) {
        Transfer &transfer = transfers_[number];
        transfer.left_bytes -= std::min(transfer.left_bytes, transfer.bytes_per_s * passed_us / 1e6);
    }
}

// Give each transfer its part: the fullest link first, again and again.
void Network::share() {
    ++changes_;
    first_end_us_.reset();
    for (const i32 number : moving_) {
        concern(transfers_[number].target);
        for (const i32 link : *transfers_[number].links)
            left_[link] = link_bytes_per_s_[link];
    }
    waiting_ = moving_;
    while (!waiting_.empty()) {
        count_users();
        const auto [part, link] = tightest();
        give(part, link);
    }
}

// How many of those that wait pass each link, in the order in which they began.
void Network::count_users() {
    for (const i32 link : used_)
        users_[link] = 0;
    used_.clear();
    for (const i32 number : waiting_)
        for (const i32 link : *transfers_[number].links)
            if (!users_[link]++)
                used_.push_back(link);
}

// The least part that a link has for each of its users, and which link it is.
std::pair<double, i32> Network::tightest() const {
    std::pair<double, i32> least{NO_LIMIT, NOBODY};
    for (const i32 link : used_) {
        const double part = left_[link] / users_[link];
        if (least.second == NOBODY || part < least.first)
            least = {part, link};
    }
    return least;
}

// Settle those that have a lower limit, or else those that pass the link.
void Network::give(double part, i32 link) {
    const auto is_slow = [&](i32 number) { return transfers_[number].limit_bytes_per_s <= part; };
    const auto passes = [&](i32 number) {
        const std::vector<i32> &links = *transfers_[number].links;
        return std::find(links.begin(), links.end(), link) != links.end();
    };
    const bool are_slow = std::any_of(waiting_.begin(), waiting_.end(), is_slow);
    std::size_t kept = 0;
    for (const i32 number : waiting_) {
        if (!(are_slow ? is_slow(number) : passes(number))) {
            waiting_[kept++] = number;
            continue;
        }
        Transfer &transfer = transfers_[number];
        transfer.bytes_per_s = std::min(transfer.limit_bytes_per_s, part);
        if (transfer.bytes_per_s <= 0)
            throw NotCovered("a transfer for which rounding leaves nothing of a link");
        for (const i32 each : *transfer.links)
            left_[each] -= transfer.bytes_per_s;
    }
    waiting_.resize(kept);
}

} // namespace sagec
