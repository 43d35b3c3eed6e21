// Sums of blocks whose depth is shared among tasks: each leaves its slice's sums here, and the last of a block adds them
// up, always in the order of the slices, so that the result does not depend on who came when.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "block.h"
#include "tasks.h"

namespace moejax {

class SlicedSums {
 public:
  // Each task has sums for `columns_each` times its columns.
  SlicedSums(const std::vector<Task>& tasks, int64_t columns_each) : columns_each_(columns_each) {
    if (tasks.empty()) return;
    blocks_ = std::make_unique<Sums[]>(tasks.back().block + 1);
    for (const Task& task : tasks)
      if (task.slices > 1 && task.slice == 0) {
        blocks_[task.block].sums.reset(new float[task.slices * Size(task)]);  // each task sets its own to zero
        blocks_[task.block].missing = task.slices;
      }
  }

  // Where a task's sums go: to memory of its thread if its block has no other slices.
  float* Of(const Task& task, Scratch& own) {
    if (task.slices == 1) return reinterpret_cast<float*>(own.Cells(Size(task)));
    return blocks_[task.block].sums.get() + task.slice * Size(task);
  }

  // Where those of all slices are once they are complete.
  float* First(const Task& task, float* own) { return task.slices == 1 ? own : blocks_[task.block].sums.get(); }

  // Whether this task, whose sums are there now, was the last of its block; if so the sums of all are in the first.
  bool Complete(const Task& task) {
    if (task.slices == 1) return true;
    if (blocks_[task.block].missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
    int64_t size = Size(task);
    float* first = blocks_[task.block].sums.get();
    for (int64_t slice = 1; slice < task.slices; ++slice)
      for (int64_t i = 0; i < size; ++i) first[i] += first[slice * size + i];
    return true;
  }

 private:
  struct Sums {
    std::unique_ptr<float[]> sums;
    std::atomic<int64_t> missing{0};
  };

  int64_t Size(const Task& task) const { return columns_each_ * task.rows * SumsStride(task.columns); }

  int64_t columns_each_;
  std::unique_ptr<Sums[]> blocks_;
};

}  // namespace moejax
