// Cutting a grouped product into blocks of about equal work.
#pragma once

#include <thread>
#include <vector>

#include "block.h"

namespace moejax {

constexpr int64_t kMostRows = 256;    // of a block: its slice of the left operand stays in the second-level cache
constexpr int64_t kMostPanels = 4;    // of a block, for the same reason
constexpr int64_t kMostFewPanels = 32;  // of a block of few rows: long rows of the right operand are read faster

// Each group's first row and, last, one past the last group's last; never past `rows`, whatever the sizes say.
inline std::vector<int64_t> GroupStarts(const int32_t* sizes, int64_t groups, int64_t rows) {
  std::vector<int64_t> starts(groups + 1, 0);
  for (int64_t g = 0; g < groups; ++g)
    starts[g + 1] = std::min<int64_t>(rows, starts[g] + std::max<int32_t>(sizes[g], 0));
  return starts;
}

// A part of one group's product: rows and columns of what that product writes.
struct Task {
  int64_t group, row, rows, column, columns;
};

class Tasks {
 public:
  explicit Tasks(int64_t columns) : columns_(columns) {}

  // Adds the product of a group that writes rows [row, row + rows).
  void Add(int64_t group, int64_t row, int64_t rows) {
    int64_t cuts = (rows + kMostRows - 1) / kMostRows;
    for (int64_t i = 0; i < cuts; ++i) {
      int64_t from = rows * i / cuts, past = rows * (i + 1) / cuts;
      parts_.push_back({group, row + from, past - from, 0, columns_});
    }
  }

  // The parts cut along the columns, into several for each core where there are as many panels.
  std::vector<Task> Cut() const {
    int64_t panels = (columns_ + kPanel - 1) / kPanel;
    int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    int64_t share = panels * static_cast<int64_t>(parts_.size()) / (4 * cores);
    std::vector<Task> tasks;
    for (const Task& part : parts_) {
      int64_t most = part.rows <= kFewRows ? kMostFewPanels : kMostPanels;
      int64_t each = std::clamp<int64_t>(share, 1, most);
      for (int64_t column = 0; column < columns_; column += each * kPanel) {
        Task task = part;
        task.column = column;
        task.columns = std::min(each * kPanel, columns_ - column);
        tasks.push_back(task);
      }
    }
    return tasks;
  }

 private:
  int64_t columns_;
  std::vector<Task> parts_;
};

}  // namespace moejax
