// 0004: what the tensor-parallel ranks say to each other: calls, bytes, time.
//
// Hooks the collectives of NCCL that TurboMind imports. A call only enqueues, so that its time on the
// host tells little; of one call in so many, events before and after it on its stream tell the time on
// the device. An engine's thread only records them. They are read by whoever asks for the figures, since
// asking for an event that is not there yet leaves an error behind for the thread that asks, and
// TurboMind looks at its threads' errors.
//
// TurboMind makes nearly all its calls in groups, and NCCL enqueues nothing of a group before it ends. So
// the events lie around the whole group, and the time is of all calls in it.
#include <atomic>
#include <chrono>
#include <mutex>
#include <vector>

#include "cuda_calls.h"
#include "hooks.h"
#include "sagec_turbomind.h"

namespace sagec::tm {

namespace {

using ncclResult = int;
using ncclDataType = int;

Original<ncclResult(const void *, void *, std::size_t, ncclDataType, int, void *, void *)>
    original_all_reduce, original_reduce_scatter;
Original<ncclResult(const void *, void *, std::size_t, ncclDataType, void *, void *)> original_all_gather;
Original<ncclResult(const void *, void *, std::size_t, ncclDataType, int, void *, void *)> original_broadcast;
Original<ncclResult(const void *, void *, std::size_t, ncclDataType, int, int, void *, void *)>
    original_reduce;
Original<ncclResult()> original_group_start, original_group_end;

struct Totals {
    std::atomic<std::int64_t> calls{0}, bytes{0}, enqueue_ns{0}, device_ns{0}, timed_calls{0};
};
Totals totals[SAGEC_TM_NUM_COLLECTIVES];
std::atomic<int> timed_every{0};

// int8, uint8, int32, uint32, int64, uint64, half, float, double, bfloat16, and two of 8 bits
std::int64_t bytes_of(ncclDataType type) {
    static constexpr std::int64_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    const bool is_known = type >= 0 && type < static_cast<int>(std::size(bytes));
    return is_known ? bytes[type] : 0;
}

// Events around a call or a group of calls, on the device that they were made for.
struct Timing {
    void *begin = nullptr, *end = nullptr;
    int device = 0, collective = 0, num_calls = 0;
    bool is_recorded = false;
};

// As many calls are timed at once, and no more until somebody reads the figures.
constexpr std::size_t kMaxTimings = 256;
std::mutex timings_mutex;
// Never destroyed: engines may still run when the process ends.
auto &under_way = *new std::vector<Timing>;
auto &unused = *new std::vector<Timing>;
std::size_t num_timings = 0;

// Events that nobody uses, or new ones; their `begin` is null where there are none.
Timing take_timing(int device) {
    std::lock_guard<std::mutex> lock(timings_mutex);
    for (Timing &timing : unused) {
        if (timing.device != device)
            continue;
        const Timing taken = timing;
        timing = unused.back();
        unused.pop_back();
        return taken;
    }
    Timing made;
    made.device = device;
    if (num_timings >= kMaxTimings)
        return {};
    if (cuda().event_create(&made.begin) || cuda().event_create(&made.end)) {
        cuda().get_last_error(); // TurboMind would take it for its own
        return {};
    }
    ++num_timings;
    return made;
}

Timing begin_timing(int collective, std::int64_t call, void *stream) {
    const int every = timed_every.load(std::memory_order_relaxed);
    int device = 0;
    if (every <= 0 || call % every || !cuda().can_time() || cuda().get_device(&device))
        return {};
    Timing timing = take_timing(device);
    timing.collective = collective;
    timing.is_recorded = timing.begin && cuda().event_record(timing.begin, stream) == 0;
    return timing;
}

void end_timing(Timing timing, int num_calls, void *stream) {
    if (!timing.begin)
        return;
    timing.num_calls = num_calls;
    timing.is_recorded = timing.is_recorded && cuda().event_record(timing.end, stream) == 0;
    if (!timing.is_recorded)
        cuda().get_last_error(); // likewise
    std::lock_guard<std::mutex> lock(timings_mutex);
    (timing.is_recorded ? under_way : unused).push_back(timing);
}

// Counts the timings that are over, and leaves the others.
void read_timings() {
    std::lock_guard<std::mutex> lock(timings_mutex);
    std::vector<Timing> unfinished;
    for (const Timing &timing : under_way) {
        float milliseconds = 0;
        if (cuda().event_elapsed(&milliseconds, timing.begin, timing.end)) {
            unfinished.push_back(timing);
            continue;
        }
        totals[timing.collective].device_ns += static_cast<std::int64_t>(milliseconds * 1e6);
        totals[timing.collective].timed_calls += timing.num_calls;
        unused.push_back(timing);
    }
    if (!unfinished.empty())
        cuda().get_last_error(); // "not ready" is none
    under_way = std::move(unfinished);
}

// The calls that this thread has made and NCCL has not enqueued yet, of one kind and on one stream; or the
// one that it makes outside of any group.
struct Group {
    int depth = 0, num_calls = 0, collective = 0;
    void *stream = nullptr;
    Timing timing;
};
thread_local Group group;

void end_group() {
    end_timing(group.timing, group.num_calls, group.stream);
    group.timing = {};
    group.num_calls = 0;
}

// Makes a call, whose time on the host counts for the collective.
template <class Call> ncclResult clocked(int collective, Call call) {
    const auto begin = std::chrono::steady_clock::now();
    const ncclResult result = call();
    const auto spent = std::chrono::steady_clock::now() - begin;
    totals[collective].enqueue_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
    return result;
}

template <class Call>
ncclResult counted(int collective, std::size_t count, ncclDataType type, void *stream, Call call) {
    Totals &total = totals[collective];
    const std::int64_t number = total.calls++;
    total.bytes += static_cast<std::int64_t>(count) * bytes_of(type);
    group.collective = collective;
    group.stream = stream;
    ++group.num_calls;
    if (!group.timing.begin)
        group.timing = begin_timing(collective, number, stream);
    const ncclResult result = clocked(collective, call);
    if (group.depth == 0)
        end_group();
    return result;
}

ncclResult group_start() {
    ++group.depth;
    return original_group_start();
}

ncclResult group_end() {
    const ncclResult result = clocked(group.collective, [] { return original_group_end(); });
    if (group.depth > 0 && --group.depth == 0) // 0: it began before there was a hook
        end_group();
    return result;
}

ncclResult all_reduce(const void *from, void *to, std::size_t count, ncclDataType type, int op, void *comm,
                      void *stream) {
    return counted(SAGEC_TM_ALL_REDUCE, count, type, stream,
                   [&] { return original_all_reduce(from, to, count, type, op, comm, stream); });
}

ncclResult all_gather(const void *from, void *to, std::size_t count, ncclDataType type, void *comm,
                      void *stream) {
    return counted(SAGEC_TM_ALL_GATHER, count, type, stream,
                   [&] { return original_all_gather(from, to, count, type, comm, stream); });
}

ncclResult reduce_scatter(const void *from, void *to, std::size_t count, ncclDataType type, int op,
                          void *comm, void *stream) {
    return counted(SAGEC_TM_REDUCE_SCATTER, count, type, stream,
                   [&] { return original_reduce_scatter(from, to, count, type, op, comm, stream); });
}

ncclResult broadcast(const void *from, void *to, std::size_t count, ncclDataType type, int root, void *comm,
                     void *stream) {
    return counted(SAGEC_TM_BROADCAST, count, type, stream,
                   [&] { return original_broadcast(from, to, count, type, root, comm, stream); });
}

ncclResult reduce(const void *from, void *to, std::size_t count, ncclDataType type, int op, int root,
                  void *comm, void *stream) {
    return counted(SAGEC_TM_REDUCE, count, type, stream,
                   [&] { return original_reduce(from, to, count, type, op, root, comm, stream); });
}

} // namespace

std::vector<Hook> comm_hooks() {
    return {{"ncclAllReduce", reinterpret_cast<void *>(all_reduce), original_all_reduce.slot()},
            {"ncclAllGather", reinterpret_cast<void *>(all_gather), original_all_gather.slot()},
            {"ncclReduceScatter", reinterpret_cast<void *>(reduce_scatter), original_reduce_scatter.slot()},
            {"ncclBroadcast", reinterpret_cast<void *>(broadcast), original_broadcast.slot()},
            {"ncclReduce", reinterpret_cast<void *>(reduce), original_reduce.slot()},
            {"ncclGroupStart", reinterpret_cast<void *>(group_start), original_group_start.slot()},
            {"ncclGroupEnd", reinterpret_cast<void *>(group_end), original_group_end.slot()}};
}

} // namespace sagec::tm

using namespace sagec::tm;

void sagec_tm_collectives(sagec_tm_collective collectives[SAGEC_TM_NUM_COLLECTIVES]) {
    read_timings();
    for (int i = 0; i < SAGEC_TM_NUM_COLLECTIVES; ++i)
        collectives[i] = {totals[i].calls, totals[i].bytes, totals[i].enqueue_ns, totals[i].device_ns / 1000,
                          totals[i].timed_calls};
}

void sagec_tm_time_collectives(int32_t every) { timed_every = every; }
