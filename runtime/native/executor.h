// Instances, their events and the time between them: runtime/executor.py under a virtual clock.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "alarms.h"
#include "engine.h"
#include "loop.h"
#include "types.h"

namespace sagec {

// Serves requests on simulated instances; a turn is one of the loop.
class Executor {
  public:
    // refused: of each request, whether it cannot be served as asked.
    Executor(const std::vector<Member> &members, const std::vector<EngineSpec> &specs,
             const std::vector<Request> &requests, const std::vector<char> &refused, Directory directory,
             std::shared_ptr<Network> network, Planner &planner, Loop::PlanElsewhere plan_elsewhere);

    // Let so many turns pass; false: all requests have ended. Throws NotCovered.
    bool advance(i64 turns);

    const Loop &loop() const { return loop_; }
    const Meter &meter() const { return meter_; }
    i64 now_us() const { return now_us_; }

  private:
    void turn();
    void wait_for_inputs();
    void check_progress();
    std::optional<i64> next_us() const;
    void arrive();
    bool is_open();
    void poll(std::vector<Event> &events);
    void catch_up(std::vector<Event> &events);
    void hear(i32 instance, std::vector<Event> &events);
    void jump(std::optional<i64> coming_us);
    void wake_concerned();
    void perform(std::vector<Action> &actions);

    const std::vector<Request> &requests_;
    std::shared_ptr<Network> network_;
    std::vector<std::unique_ptr<SimEngine>> engines_;
    Alarms alarms_;
    Meter meter_;
    Loop loop_;
    std::size_t next_ = 0; // the request that comes next
    bool owes_close_ = true, closes_ = false;
    std::optional<i64> opens_us_; // when requests that have come are let in
    i64 now_us_ = 0, looked_at_us_ = -1, looks_ = 0;
    std::vector<i32> arrived_, owing_;
    std::vector<Event> events_;
};

} // namespace sagec
