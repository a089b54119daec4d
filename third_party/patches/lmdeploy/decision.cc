#include "decision.h"

namespace sagec::tm {

std::size_t StepView::place_of(std::uint64_t session) const {
    const auto mask = table_.size() - 1;
    auto place = static_cast<std::size_t>((session * 0x9E3779B97F4A7C15u) >> 32) & mask;
    while (table_[place] != 0 && rows[table_[place] - 1].session != session)
        place = (place + 1) & mask;
    return place;
}

void StepView::index_rows() {
    std::size_t size = 16;
    while (size < 2 * rows.size())
        size *= 2;
    table_.assign(size, 0);
    for (std::uint32_t i = 0; i < rows.size(); ++i)
        table_[place_of(rows[i].session)] = i + 1;
}

const sagec_tm_row *StepView::find_row(std::uint64_t session) const {
    const auto number = table_.empty() ? 0 : table_[place_of(session)];
    return number == 0 ? nullptr : &rows[number - 1];
}

} // namespace sagec::tm
