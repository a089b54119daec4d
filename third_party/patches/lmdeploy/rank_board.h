// One decision for all tensor-parallel ranks of an engine: rank 0 decides, the others take what it got.
//
// Every rank has a thread and a SequenceManager of its own, and all must compute the same in each step.
// They ask in lock step, so the n-th question of one is the n-th of all. The board belongs to the
// engine and not to an instance: an instance may be opened or closed between two ranks' questions.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>

#include "decision.h"
#include "instance.h"

namespace sagec::tm {

class RankBoard {
  public:
    // Of rank 0. Waits until all the others have taken the decision before.
    void post(const std::shared_ptr<Instance> &instance, const Decision &decision, int num_ranks);
    // Of the others. Waits for the decision of this rank's `number`-th question, from 1.
    void take(std::int64_t number, std::shared_ptr<Instance> &instance, Decision &decision);
    // Of each rank, once: waits until all have come.
    void meet(int num_ranks);

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::int64_t number_ = 0;
    int num_left_ = 0; // ranks that have not taken it
    int num_met_ = 0;
    std::shared_ptr<Instance> instance_;
    Decision decision_;
};

// The board of the engine that the rank belongs to. It lives as long as a rank holds it.
std::shared_ptr<RankBoard> board_of(const LlamaBatch &rank);

} // namespace sagec::tm
