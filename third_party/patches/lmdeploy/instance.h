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
    Instance(std::uint32_t number, const sagec_tm_options &options);

    const std::uint32_t number;
    const sagec_tm_options options;
    EventLog events;
    KvStore kv;
    std::atomic<std::uint64_t> layout{0};

    // ---- deciding.cc. `decide` is called by rank 0 alone, for all ranks.

    // The decision for `view`. Where there is none yet it waits, to the deadline at most; but no longer
    // than kHoldUs at a time: then the decision is to hold, the engine looks at its queue and at what was
    // cancelled, and asks again.
    void decide(const StepView &view, Decision &decision);
    void end_step(); // the decided step was computed and reported
    void pause();    // nobody can compute: waits for a wake, kHoldUs at most
    void rest();     // there is nobody to compute: the deadline begins anew with the next step
    std::string post(const sagec_tm_plan &plan); // "" or why it is refused
    bool wait_question(std::int64_t timeout_us, std::int64_t &step, StepView &question);
    std::string answer(std::int64_t step, const sagec_tm_item *items, int num_items);
    void wake();
    void close(); // everything is stock's from now on; wakes whoever waits
    bool is_closed() const { return is_closed_; }

    // ---- what the hooks know

    // Held by the hooks while they or TurboMind change blocks of a rank, and by whoever looks at them.
    std::mutex &blocks_mutex(int rank);
    // Null where the rank has taken no step yet; valid while one holds its blocks_mutex.
    SequenceManager *manager_of(int rank);
    void add_manager(SequenceManager &manager);
    void remove_manager(const SequenceManager &manager); // by the rank itself

    std::mutex counters_mutex;
    sagec_tm_counters counters{};
    void count(std::int64_t sagec_tm_counters::*counter, std::int64_t more = 1);

    std::mutex callback_mutex;
    sagec_tm_evicted evicted = nullptr;
    void *evicted_argument = nullptr;

  private:
    bool decide_now(const StepView &view, Decision &decision);
    bool take_plan_step(const StepView &view, Decision &decision);
    bool take_answer(const StepView &view, Decision &decision);
    void ask(const StepView &view);
    void hold(Decision &decision);
    void settle(Decision &decision, int decided_by);
    void take_over();
    void tell_done();

    std::vector<std::mutex> blocks_mutexes_;
    std::mutex managers_mutex_; // of the map; taken behind a blocks_mutex
    std::map<int, SequenceManager *> managers_;

    std::atomic<bool> is_closed_{false};
    std::mutex deciding_mutex_; // of all that follows
    std::condition_variable changed_, asked_;
    std::int64_t num_decided_ = 0;
    std::optional<std::int64_t> waiting_since_us_; // a step waits for a decision
    std::uint64_t num_wakes_ = 0, num_wakes_seen_ = 0;

    std::unique_ptr<PlanCursor> plan_, next_plan_;
    std::int64_t newest_plan_ = 0;
    bool is_plan_in_step_ = false;
    bool is_plan_fresh_ = false; // posted after the engine has looked at its queue
    std::vector<Gap> gaps_;

    bool is_asked_ = false;
    StepView question_;
    std::optional<std::vector<sagec_tm_item>> answer_;
};

// "" or why it is refused.
std::string open_instance(std::uint32_t number, const sagec_tm_options &options);
void close_instance(std::uint32_t number);

// The instance of a session, or null: closed, or nobody's of ours. Shared, so that a close does not
// take it away under a hook.
std::shared_ptr<Instance> instance_of(std::uint64_t session);
std::shared_ptr<Instance> instance_numbered(std::uint32_t number);
std::shared_ptr<Instance> instance_of(const Sequences &sequences); // of number_of
int num_instances();

// The number of the instance that all these sessions are of: they are one engine's. 0 where any is not
// ours, or where there are none.
std::uint32_t number_of(const Sequences &sequences);

// What this thread is: a rank of an engine, and the instance of the step that it took last. All null on
// threads that are none (0003 sets it).
struct Place {
    std::shared_ptr<Instance> instance;
    LlamaBatch *batch = nullptr;
    SequenceManager *manager = nullptr;
    int rank = 0;

    ~Place(); // the engine ends: its manager is no longer the instance's
};
Place &here();

std::int64_t now_us();

} // namespace sagec::tm
