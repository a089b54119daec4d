#include "rank_board.h"

#include <map>
#include <utility>

namespace sagec::tm {

void RankBoard::post(const std::shared_ptr<Instance> &instance, const Decision &decision, int num_ranks) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_left_ == 0; });
    ++number_;
    num_left_ = num_ranks - 1;
    instance_ = instance;
    decision_ = decision;
    changed_.notify_all();
}

void RankBoard::take(std::int64_t number, std::shared_ptr<Instance> &instance, Decision &decision) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return number_ == number; });
    instance = instance_;
    decision = decision_;
    if (--num_left_ == 0)
        changed_.notify_all();
}

void RankBoard::meet(int num_ranks) {
    std::unique_lock lock(mutex_);
    ++num_met_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return num_met_ >= num_ranks; });
}

std::shared_ptr<RankBoard> board_of(const LlamaBatch &rank) {
    static std::mutex mutex;
    static auto &boards = *new std::map<std::pair<const void *, int>, std::weak_ptr<RankBoard>>;
    std::lock_guard lock(mutex);
    auto &known = boards[{rank.gateway, rank.dp_rank}];
    auto board = known.lock();
    if (!board)
        known = board = std::make_shared<RankBoard>();
    return board;
}

} // namespace sagec::tm
