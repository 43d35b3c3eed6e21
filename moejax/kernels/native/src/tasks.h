// Cutting a grouped product into blocks of about equal work.
#pragma once

#include <vector>

#include "block.h"
#include "cores.h"

namespace moejax {

constexpr int64_t kMostRows = 256;    // of a block: its slice of the left operand stays in the second-level cache
constexpr int64_t kMostPanels = 4;    // of a block, for the same reason
constexpr int64_t kLeastDepth = 64;   // of a task that has a part of the depth
constexpr int64_t kWideFloats = 8192;   // sums of a block of few rows, which stay in the first-level caches
constexpr int64_t kWideColumns = 2048;  // but as many columns at the least: a page or more of a row is read faster

// Each group's first row and, last, one past the last group's last; never past `rows`, whatever the sizes say.
inline std::vector<int64_t> GroupStarts(const int32_t* sizes, int64_t groups, int64_t rows) {
  std::vector<int64_t> starts(groups + 1, 0);
  for (int64_t g = 0; g < groups; ++g)
    starts[g + 1] = std::min<int64_t>(rows, starts[g] + std::max<int32_t>(sizes[g], 0));
  return starts;
}

// A part of one group's product: rows and columns of what that product writes, and which of so many slices of its depth.
// All slices of one block are tasks that have `block` in common.
struct Task {
  int64_t group, row, rows, column, columns;
  int64_t block = 0, slice = 0, slices = 1;

  // Where a slice begins; it ends where the next would begin.
  int64_t Depth(int64_t slice, int64_t depth) const {
    constexpr int64_t kWhole = 16;  // steps that are done at once
    return slice == slices ? depth : depth * slice / slices / kWhole * kWhole;
  }
};

class Tasks {
 public:
  explicit Tasks(int64_t columns) : columns_(columns) {}

  // Adds the product of a group that writes rows [row, row + rows). Few of them are cut along the depth where one is
  // given, that of a right operand whose columns lie side by side: so each task reads long pieces of memory. All others
  // are cut along the columns.
  void Add(int64_t group, int64_t row, int64_t rows, int64_t depth = 0) {
    int64_t cuts = (rows + kMostRows - 1) / kMostRows;
    for (int64_t i = 0; i < cuts; ++i) {
      int64_t from = rows * i / cuts, past = rows * (i + 1) / cuts;
      parts_.push_back({{group, row + from, past - from, 0, columns_}, depth});
    }
  }

  // The parts cut into several tasks for each core where there is enough of them.
  std::vector<Task> Cut() const {
    std::vector<Task> tasks;
    int64_t blocks = 0;
    for (const Part& part : parts_)
      for (Task task = part.task; task.column < columns_; task.column += task.columns) {
        task.columns = std::min(Width(part), columns_ - task.column);
        task.slices = Slices(part);
        task.block = blocks++;
        for (task.slice = 0; task.slice < task.slices; ++task.slice) tasks.push_back(task);
      }
    return tasks;
  }

 private:
  struct Part {
    Task task;
    int64_t depth;
  };

  static int64_t Wanted() { return 4 * Cores(); }

  bool AlongDepth(const Part& part) const { return part.depth > 0 && part.task.rows <= kFewRows; }

  int64_t Width(const Part& part) const {
    if (AlongDepth(part)) {
      int64_t most = std::max(kWideColumns, kWideFloats / part.task.rows), cuts = (columns_ + most - 1) / most;
      return Whole((columns_ + cuts - 1) / cuts);
    }
    int64_t share = Whole(columns_) / kPanel * static_cast<int64_t>(parts_.size()) / Wanted();
    int64_t most = part.task.rows <= kFewRows ? kWideColumns / kPanel : kMostPanels;
    return std::clamp<int64_t>(share, 1, most) * kPanel;
  }

  int64_t Slices(const Part& part) const {
    if (!AlongDepth(part)) return 1;
    int64_t width = Width(part), blocks = static_cast<int64_t>(parts_.size()) * ((columns_ + width - 1) / width);
    return std::clamp<int64_t>((Wanted() + blocks - 1) / blocks, 1, std::max<int64_t>(1, part.depth / kLeastDepth));
  }

  static int64_t Whole(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

  int64_t columns_;
  std::vector<Part> parts_;
};

}  // namespace moejax
