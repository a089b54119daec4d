#include "instance.h"

#include <algorithm>
#include <ctime>

namespace sagec::tm {
namespace {

struct Registry {
    std::mutex mutex;
    std::map<std::uint32_t, std::shared_ptr<Instance>> instances;
};

// Never destroyed: engines may still run when the process ends.
Registry &registry() {
    static auto &only = *new Registry;
    return only;
}

constexpr std::int64_t kLogCapacity = 65536;
constexpr int kMaxRanks = 64;

std::string check_options(const sagec_tm_options &options) {
    if (options.decider < SAGEC_TM_STOCK || options.decider > SAGEC_TM_ANSWERS)
        return "decider " + std::to_string(options.decider) + "; there are 0 stock, 1 plans, 2 answers";
    if (options.num_ranks < 1 || options.num_ranks > kMaxRanks)
        return "num_ranks " + std::to_string(options.num_ranks) + "; 1 to " + std::to_string(kMaxRanks) +
               " are possible";
    if (options.decider != SAGEC_TM_STOCK && options.deadline_us < 1)
        return "deadline_us " + std::to_string(options.deadline_us) + "; a decision must get some time";
    if (options.log_capacity < 0)
        return "log_capacity " + std::to_string(options.log_capacity) + " is negative";
    return "";
}

} // namespace

Instance::Instance(std::uint32_t number, const sagec_tm_options &options)
    : number(number), options(options), events(options.log_capacity ? options.log_capacity : kLogCapacity),
      blocks_mutexes_(static_cast<std::size_t>(options.num_ranks)) {}

// An engine with more ranks than was said shares the last mutex among them.
std::mutex &Instance::blocks_mutex(int rank) {
    return blocks_mutexes_[std::min(static_cast<std::size_t>(rank), blocks_mutexes_.size() - 1)];
}

SequenceManager *Instance::manager_of(int rank) {
    std::lock_guard lock(managers_mutex_);
    const auto found = managers_.find(rank);
    return found == managers_.end() ? nullptr : found->second;
}

void Instance::add_manager(SequenceManager &manager) {
    std::lock_guard blocks_lock(blocks_mutex(manager.rank));
    std::lock_guard lock(managers_mutex_);
    managers_[manager.rank] = &manager;
}

void Instance::remove_manager(const SequenceManager &manager) {
    std::lock_guard blocks_lock(blocks_mutex(manager.rank));
    std::lock_guard lock(managers_mutex_);
    const auto found = managers_.find(manager.rank);
    if (found != managers_.end() && found->second == &manager)
        managers_.erase(found);
}

void Instance::count(std::int64_t sagec_tm_counters::*counter, std::int64_t more) {
    std::lock_guard lock(counters_mutex);
    counters.*counter += more;
}

std::shared_ptr<Instance> instance_numbered(std::uint32_t number) {
    auto &all = registry();
    std::lock_guard lock(all.mutex);
    const auto found = all.instances.find(number);
    return found == all.instances.end() ? nullptr : found->second;
}

std::shared_ptr<Instance> instance_of(std::uint64_t session) {
    const auto number = static_cast<std::uint32_t>(session >> SAGEC_TM_INSTANCE_SHIFT);
    return number ? instance_numbered(number) : nullptr;
}

std::shared_ptr<Instance> instance_of(const Sequences &sequences) {
    const auto number = number_of(sequences);
    return number ? instance_numbered(number) : nullptr;
}

std::string open_instance(std::uint32_t number, const sagec_tm_options &options) {
    const auto name = "instance " + std::to_string(number);
    if (number < 1 || number > 65535)
        return name + ": instances are numbered 1 to 65535";
    if (auto why = check_options(options); !why.empty())
        return name + ": " + why;
    auto &all = registry();
    std::lock_guard lock(all.mutex);
    const auto opened = all.instances.try_emplace(number);
    if (!opened.second)
        return name + " is open already";
    opened.first->second = std::make_shared<Instance>(number, options);
    return "";
}

void close_instance(std::uint32_t number) {
    std::shared_ptr<Instance> closed;
    {
        auto &all = registry();
        std::lock_guard lock(all.mutex);
        const auto found = all.instances.find(number);
        if (found == all.instances.end())
            return;
        closed = found->second;
        all.instances.erase(found);
    }
    closed->close();
}

int num_instances() {
    auto &all = registry();
    std::lock_guard lock(all.mutex);
    return static_cast<int>(all.instances.size());
}

std::uint32_t number_of(const Sequences &sequences) {
    if (sequences.empty())
        return 0;
    const auto number = sequences.front()->id >> SAGEC_TM_INSTANCE_SHIFT;
    for (const auto *sequence : sequences)
        if (sequence->id >> SAGEC_TM_INSTANCE_SHIFT != number)
            return 0;
    return static_cast<std::uint32_t>(number);
}

Place::~Place() {
    if (instance && manager)
        instance->remove_manager(*manager);
}

Place &here() {
    thread_local Place place;
    return place;
}

std::int64_t now_us() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

} // namespace sagec::tm
