// What serving used: runtime/meter.py, as columns.
#include "meter.h"

namespace sagec {

void Meter::hear(const Event &event) {
    const Handle &handle = event.handle;
    if (event.kind == Event::stepped)
        stepped(event);
    if (event.kind == Event::exported)
        uses[handle.source].sent_bytes += handle.num_bytes;
    if (event.kind == Event::imported)
        imported(event);
}

void Meter::planned(i64 now_us, i64 num_waiting, i64 num_running) {
    rounds_us.push_back(now_us);
    waiting.push_back(num_waiting);
    running.push_back(num_running);
}

void Meter::stepped(const Event &report) {
    InstanceUse &use = uses[report.instance];
    use.steps += report.steps;
    use.busy_us += report.end_us - report.begin_us;
    report_instances.push_back(report.instance);
    report_ends_us.push_back(report.end_us);
    report_kv_blocks.push_back(report.kv_blocks_used);
    for (const auto &[request, begin, end] : report.chunks) {
        computed_[request] = end;
        use.prompt_tokens += end - begin;
        use.pairs += static_cast<double>((end - begin) * (begin + end + 1)) / 2;
    }
    for (const auto &reuse : report.reused)
        use.reused_tokens += reuse.tokens;
    for (const auto &advance : report.advanced)
        use.sampled_tokens += advance.count;
    use.decode_tokens += static_cast<i64>(report.decodes.size()) * report.steps;
    for (const i32 request : report.decodes) {
        const i64 before = computed_[request];
        use.pairs += static_cast<double>(report.steps * (2 * before + report.steps + 1)) / 2;
        computed_[request] = before + report.steps;
    }
}

void Meter::imported(const Event &event) {
    moved.push_back(event.request);
    move_sources.push_back(event.source);
    move_targets.push_back(event.instance);
    move_bytes.push_back(event.num_bytes);
    move_begins_us.push_back(event.begin_us);
    move_ends_us.push_back(event.end_us);
}

} // namespace sagec
