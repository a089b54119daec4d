// An instance: who decides its steps, what happened on it, and its KV in host memory. The hooks find it
// by the sessions that they are called with.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "abi.h"
#include "decision.h"
#include "event_log.h"
#include "kv_store.h"
#include "plan_cursor.h"

namespace sagec::tm {

class Instance {
  public:
    Instance(std::uint32_t number, const sagec_tm_options &options) : number(number), options(options) {}

    const std::uint32_t number;
    const sagec_tm_options options;
    EventLog events;
    KvStore kv;
    std::atomic<std::uint64_t> layout{0};

    // Of deciding.cc. The decision for `view`, one for all ranks: rank 0 asks the plan, the answerer or
    // nobody, and the others take what it got for the same step. Waits while there is nothing to do, to
    // the deadline at most; a held step comes back as one that holds, after at most kHoldUs, so that the
    // engine looks at its queue and at what was cancelled.
    Decision decide(const StepView &view, int rank);
    void post(std::unique_ptr<PlanCursor> plan);
    bool wait_question(std::int64_t timeout_us, StepView &question);
    std::string answer(std::int64_t step, std::vector<sagec_tm_item> items);
    void wake();
    void close();

    // Held by the hooks while they or TurboMind change blocks of a rank, and by whoever looks at them.
    std::mutex &blocks_mutex(int rank);
    std::map<int, SequenceManager *> managers; // by rank, set when a rank takes its first step

    std::mutex counters_mutex;
    sagec_tm_counters counters{};
    void count(std::int64_t sagec_tm_counters::*counter, std::int64_t more = 1);

    std::mutex callback_mutex;
    sagec_tm_evicted evicted = nullptr;
    void *evicted_argument = nullptr;
};

// The instance of a session, or null: closed, or nobody's of ours. Shared, so that a close does not
// take it away under a hook.
std::shared_ptr<Instance> instance_of(std::uint64_t session);
std::shared_ptr<Instance> instance_numbered(std::uint32_t number);
// Of the sessions that a step could compute: they are all one engine's. Null where any is not ours.
std::shared_ptr<Instance> instance_of(const Sequences &sequences);
// The instance whose step this thread is in, and its rank; null outside (0003 sets it).
struct Place {
    std::shared_ptr<Instance> instance;
    LlamaBatch *batch = nullptr;
    int rank = 0;
};
Place &here();

std::int64_t now_us();

} // namespace sagec::tm
