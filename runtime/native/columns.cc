// Columns by name: how a simulation is told what to simulate, and tells what came of it.
#include "columns.h"

#include <utility>

namespace sagec {

namespace {

template <typename Value>
std::vector<Value> part_of(const std::vector<Value> &column, const std::vector<i64> &at, std::size_t row) {
    return {column.begin() + at.at(row), column.begin() + at.at(row + 1)};
}

} // namespace

void Columns::put(const std::string &name, std::vector<i64> column) { ints_[name] = std::move(column); }

void Columns::put(const std::string &name, std::vector<double> column) { floats_[name] = std::move(column); }

std::vector<i64> Columns::ints_of(const std::string &name, std::size_t row) const {
    return part_of(ints(name), ints(name + ".at"), row);
}

std::vector<double> Columns::floats_of(const std::string &name, std::size_t row) const {
    return part_of(floats(name), ints(name + ".at"), row);
}

} // namespace sagec
