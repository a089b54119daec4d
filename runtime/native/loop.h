// The serving loop: runtime/loop.py, for what can happen where nothing fails and nobody cancels.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "columns.h"
#include "directory.h"
#include "fifo.h"
#include "meter.h"
#include "planner.h"
#include "table.h"
#include "types.h"

namespace sagec {

// To be done, in this order.
struct Action {
    enum Kind : i32 { submit, deliver, cancel };

    Kind kind = submit;
    i32 instance = NOBODY;
    Plan plan;                  // submit
    std::vector<Sent> requests; // submit: those that the instance does not know
    Handle handle;              // deliver
    i32 request = NOBODY;       // cancel
};

// A request that ended; all else is in its row.
struct Ended {
    i32 request = NOBODY;
    Ending ending = Ending::served;
    i64 end_us = 0;
};

class Loop {
  public:
    using CatchUp = std::function<void(std::vector<Event> &)>;
    // Plans of a round that the planner does not cover; of the state in columns.
    using PlanElsewhere = std::function<std::vector<Plan>(Columns state)>;

    // refused: of each request, whether it cannot be served as asked. catch_up: what instances have
    // done and not said, asked before a round.
    Loop(const std::vector<Member> &members, const std::vector<Request> &requests,
         const std::vector<char> &refused, Directory directory, Planner &planner,
         PlanElsewhere plan_elsewhere, Meter &meter, CatchUp catch_up);

    // A turn: the time, what is heard, and what follows from it.
    void set_time(i64 now_us) { now_us_ = now_us; }
    void arrive(i32 request);
    void close() { is_closed_ = is_due_ = true; }
    void hear(const Event &event);
    void decide();

    bool is_done() const { return is_closed_ && !table_.num_live(); }
    std::vector<Action> &actions() { return actions_; }
    const std::vector<Ended> &ended() const { return ended_; }
    const Table &table() const { return table_; }

  private:
    // What the loop remembers of a plan at work.
    struct AtWork {
        i64 round = NOBODY; // NOBODY: there is none
        i32 num_steps = 0;
        std::vector<i32> imports;
        bool is_there() const { return round != NOBODY; }
    };

    void stepped(const Event &report);
    void count_tokens(const Event &report);
    void exported(const Event &event);
    void imported(const Event &event);
    void preempted(const Event &event);
    void plan_done(const Event &event);
    void cancelled(const Event &event);

    bool is_on(const Serving &row, i32 instance) const;
    bool imports(i32 instance, i32 request) const;
    bool is_idle_in_vain() const;
    bool is_on_idle(const InOrder &requests) const;
    void changed() { is_due_ = true, futile_rounds_ = 0; }
    void wait(i32 request, i64 prompt_tokens);
    void go_on_waiting(i32 request);
    void drop_shadow(i32 request, i32 keep = NOBODY);
    void cancel_on(i32 request, i32 instance);
    void finish(i32 request, Ending ending);

    void ask();
    void see();
    i64 count_blocks(const Serving &row);
    void see_admitted();
    std::vector<Plan> planned();
    Columns state() const;
    void put_asked(const std::string &prefix, const InOrder &requests, Columns &state) const;
    void submit(Plan plan);
    void begin_row(i32 request, i32 instance, i32 target, std::vector<Sent> &sent);
    void place(i32 request, i32 instance, std::vector<Sent> &sent);
    i64 limit_tokens(i64 prompt_tokens) const;

    std::vector<Member> members_;
    const std::vector<char> &refused_;
    Fifo fifo_;
    Table table_;
    Directory directory_;
    Planner &planner_;
    PlanElsewhere plan_elsewhere_;
    Meter &meter_;
    CatchUp catch_up_;
    std::vector<AtWork> at_work_;
    std::vector<Action> actions_;
    std::vector<Ended> ended_;
    i64 now_us_ = 0;
    i64 round_number_ = 0, futile_rounds_ = 0;
    bool is_due_ = false, is_closed_ = false;

    // Of the round at hand, to be used again.
    Round round_;
    Seen seen_;
    Decision decision_;
    std::vector<i64> cached_;
    std::vector<Event> owed_;
    std::vector<i32> targets_;
    std::vector<char> computes_;
};

} // namespace sagec
