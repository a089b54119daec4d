// Columns by name: how a simulation is told what to simulate, and tells what came of it.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace sagec {

class Columns {
  public:
    void put(const std::string &name, std::vector<i64> column);
    void put(const std::string &name, std::vector<double> column);

    // Throws std::out_of_range for a column that nobody put.
    const std::vector<i64> &ints(const std::string &name) const { return ints_.at(name); }
    const std::vector<double> &floats(const std::string &name) const { return floats_.at(name); }
    i64 one(const std::string &name) const { return ints(name).at(0); }
    // A part of a column of lists: [name + ".at"][row] is where its part begins.
    std::vector<i64> ints_of(const std::string &name, std::size_t row) const;
    std::vector<double> floats_of(const std::string &name, std::size_t row) const;

  private:
    std::unordered_map<std::string, std::vector<i64>> ints_;
    std::unordered_map<std::string, std::vector<double>> floats_;
};

// What `value_of` says of each of the rows.
template <typename Rows, typename Value> std::vector<i64> column_of(const Rows &rows, Value value_of) {
    std::vector<i64> column;
    for (const auto &row : rows)
        column.push_back(value_of(row));
    return column;
}

} // namespace sagec
