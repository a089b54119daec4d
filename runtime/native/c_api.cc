// What runtime/native/library.py calls: columns in, turns, columns out.
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "columns.h"
#include "simulation.h"

namespace {

using sagec::i64;

// Which blocks a request has with so much output: how many, and where they are until the next call.
// Less than 0: it went wrong.
using sagec_blocks_of = i64 (*)(sagec::i32 request, i64 output_tokens, const i64 **blocks);

// A round is to be planned: its state is in the columns of the result, the plans are to be put.
// Less than 0: it went wrong.
using sagec_plan = int (*)();

// A run and what was said of it. reason: why it cannot be simulated here.
struct Run {
    sagec::Columns told, result;
    std::unique_ptr<sagec::Simulation> simulation;
    sagec_blocks_of blocks_of = nullptr;
    sagec_plan plan = nullptr;
    std::string reason;

    void begin();
    std::vector<i64> ask_blocks(sagec::i32 request, i64 output_tokens) const;
    std::vector<sagec::Plan> ask_plans(sagec::Columns state);
};

void Run::begin() {
    sagec::Directory::BlocksOf blocks;
    if (blocks_of) {
        blocks = [this](sagec::i32 request, i64 output) { return ask_blocks(request, output); };
    }
    simulation = std::make_unique<sagec::Simulation>(
        told, blocks, [this](sagec::Columns state) { return ask_plans(std::move(state)); });
}

std::vector<i64> Run::ask_blocks(sagec::i32 request, i64 output_tokens) const {
    const i64 *blocks = nullptr;
    const i64 count = blocks_of(request, output_tokens, &blocks);
    if (count < 0)
        throw std::runtime_error("nobody could say which blocks a request has");
    return {blocks, blocks + count};
}

std::vector<sagec::Plan> Run::ask_plans(sagec::Columns state) {
    result = std::move(state);
    if (plan() < 0)
        throw std::runtime_error("nobody could plan a round");
    return sagec::read_plans(told);
}

template <typename Value> i64 give(const std::vector<Value> &column, const Value **values) {
    *values = column.data();
    return static_cast<i64>(column.size());
}

} // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED void *sagec_run_new() { return new Run; }

EXPORTED void sagec_run_free(void *run) { delete static_cast<Run *>(run); }

EXPORTED void sagec_run_put_ints(void *run, const char *name, const i64 *values, i64 count) {
    static_cast<Run *>(run)->told.put(name, std::vector<i64>(values, values + count));
}

EXPORTED void sagec_run_put_floats(void *run, const char *name, const double *values, i64 count) {
    static_cast<Run *>(run)->told.put(name, std::vector<double>(values, values + count));
}

// Who is asked for plans, and for blocks: null where nobody caches any.
EXPORTED void sagec_run_ask(void *handle, sagec_plan plan, sagec_blocks_of blocks_of) {
    Run &run = *static_cast<Run *>(handle);
    run.plan = plan;
    run.blocks_of = blocks_of;
}

// 1: there is more to do; 0: all requests have ended; -1: it is not covered; -2: it went wrong. The
// last two have a reason.
EXPORTED int sagec_run_advance(void *handle, i64 turns) {
    Run &run = *static_cast<Run *>(handle);
    try {
        if (!run.simulation)
            run.begin();
        if (run.simulation->advance(turns))
            return 1;
        run.result = run.simulation->result();
        return 0;
    } catch (const sagec::NotCovered &error) {
        run.reason = error.what();
        return -1;
    } catch (const std::exception &error) {
        run.reason = error.what();
        return -2;
    }
}

EXPORTED const char *sagec_run_reason(void *run) { return static_cast<Run *>(run)->reason.c_str(); }

// How many values a column of the result has, and where they are until the run is freed.
EXPORTED i64 sagec_run_ints(void *run, const char *name, const i64 **values) {
    return give(static_cast<Run *>(run)->result.ints(name), values);
}

EXPORTED i64 sagec_run_floats(void *run, const char *name, const double **values) {
    return give(static_cast<Run *>(run)->result.floats(name), values);
}

} // extern "C"
