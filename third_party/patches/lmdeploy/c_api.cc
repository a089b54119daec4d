// The C ABI, but for what is of KV and of collectives (0001, 0004).
#include <algorithm>

#include "event_log.h"
#include "hooks.h"
#include "instance.h"
#include "plan_cursor.h"
#include "refusal.h"
#include "sagec_turbomind.h"

using namespace sagec::tm;

namespace {

std::mutex apply_mutex;

std::string apply() {
    std::lock_guard lock(apply_mutex);
    if (num_patched() > 0)
        return "";
    if (auto why = missing(all_hooks()); !why.empty())
        return why;
    if (auto why = test_layouts(); !why.empty())
        return why;
    return patch(all_hooks());
}

std::string revert() {
    std::lock_guard lock(apply_mutex);
    if (const int open = num_instances(); open > 0)
        return std::to_string(open) + " instances are open; close them first";
    restore();
    return "";
}

struct TestedCursor {
    PlanCursor cursor;
    StepView view;
    Decision decision;
    std::vector<Gap> gaps;
};

} // namespace

namespace sagec::tm {

std::vector<Hook> all_hooks() {
    auto all = kv_manager_hooks();
    for (const auto &hooks : {prefix_hooks(), scheduler_hooks(), comm_hooks()})
        all.insert(all.end(), hooks.begin(), hooks.end());
    return all;
}

} // namespace sagec::tm

// ---- the patch

int32_t sagec_tm_abi(void) { return SAGEC_TM_ABI; }

const char *sagec_tm_seams(void) {
    return refusal_of([] { return missing(all_hooks()); });
}

const char *sagec_tm_selftest(void) { return refusal_of(test_layouts); }

const char *sagec_tm_apply(void) { return refusal_of(apply); }

const char *sagec_tm_revert(void) { return refusal_of(revert); }

int32_t sagec_tm_num_slots(void) { return num_patched(); }

// ---- instances

const char *sagec_tm_open(uint32_t instance, const sagec_tm_options *options) {
    return refusal_of([&] { return open_instance(instance, *options); });
}

void sagec_tm_close(uint32_t instance) { close_instance(instance); }

void sagec_tm_wake(uint32_t number) {
    if (const auto instance = instance_numbered(number))
        instance->wake();
}

// ---- decisions

const char *sagec_tm_post_plan(uint32_t number, const sagec_tm_plan *plan) {
    return refusal_of(number, [&](Instance &instance) { return instance.post(*plan); });
}

int32_t sagec_tm_wait_question(uint32_t number, int64_t timeout_us, sagec_tm_question *question,
                               sagec_tm_row *rows, int32_t capacity) {
    const auto instance = instance_numbered(number);
    StepView view;
    if (!instance || !instance->wait_question(timeout_us, question->step, view))
        return 0;
    question->num_rows = static_cast<int32_t>(view.rows.size());
    question->free_blocks = view.free_blocks;
    question->cached_blocks = view.cached_blocks;
    question->budget_tokens = view.budget_tokens;
    std::copy_n(view.rows.begin(), std::min(question->num_rows, capacity), rows);
    return 1;
}

const char *sagec_tm_answer(uint32_t number, int64_t step, const sagec_tm_item *items, int32_t num_items) {
    return refusal_of(number, [&](Instance &instance) { return instance.answer(step, items, num_items); });
}

// ---- what happened

int64_t sagec_tm_read(uint32_t number, int64_t *events, int64_t capacity, int64_t timeout_us) {
    const auto instance = instance_numbered(number);
    return instance ? instance->events.read(events, capacity, timeout_us) : 0;
}

const char *sagec_tm_count(uint32_t number, sagec_tm_counters *counters) {
    return refusal_of(number, [&](Instance &instance) {
        std::lock_guard lock(instance.counters_mutex);
        *counters = instance.counters;
        return std::string();
    });
}

// ---- for tests

void *sagec_tm_cursor_new(const sagec_tm_plan *plan) {
    return check_plan(*plan).empty() ? new TestedCursor{PlanCursor(*plan), {}, {}, {}} : nullptr;
}

int32_t sagec_tm_cursor_next(void *cursor, const sagec_tm_row *rows, int32_t num_rows, sagec_tm_item *items,
                             int32_t capacity, int64_t *plan_step) {
    auto &tested = *static_cast<TestedCursor *>(cursor);
    tested.view.rows.assign(rows, rows + num_rows);
    tested.view.index_rows();
    if (!tested.cursor.next(tested.view, tested.decision, tested.gaps))
        return 0;
    const auto num_items = static_cast<int32_t>(tested.decision.items.size());
    std::copy_n(tested.decision.items.begin(), std::min(num_items, capacity), items);
    *plan_step = tested.decision.plan_step;
    return num_items;
}

int32_t sagec_tm_cursor_gaps(void *cursor) {
    return static_cast<int32_t>(static_cast<TestedCursor *>(cursor)->gaps.size());
}

void sagec_tm_cursor_free(void *cursor) { delete static_cast<TestedCursor *>(cursor); }
