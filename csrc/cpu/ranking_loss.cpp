// Bradley-Terry loss over the ordered pairs of every group. Answers are sorted by group and rank,
// so that the answers an answer beats are the contiguous rest of its group.

#include <cmath>
#include <numeric>
#include <vector>

#include "../ops.h"
#include "moments.h"

namespace fastrl::cpu::FASTRL_ISA {

namespace {

struct Inputs {
  const float* scores;
  const int64_t* group_ids;
  const double* ranks;
  const float* margins;  // may be null
  float center_coef;
};

struct Span {
  int64_t begin, end;
};

struct GroupSums {
  double loss = 0.0, right = 0.0, difference = 0.0;
  int64_t pairs = 0;
};

// log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3. Relative error under 2e-7.
inline vfloat log1p(vfloat e) {
  const vfloat s = e / (e + 2.0f), q = s * s;
  vfloat p = broadcast(1.0f / 15);
#pragma GCC unroll 7
  for (int odd = 13; odd > 0; odd -= 2) p = p * q + 1.0f / odd;
  return 2.0f * s * p;
}

void check_ranks(const double* ranks, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (std::isnan(ranks[i])) {
      throw std::invalid_argument("ranking_loss: ranks: expected numbers, got nan at position " +
                                  std::to_string(i));
    }
  }
}

std::vector<int64_t> sorted_by_group_and_rank(const Inputs& x, int64_t size) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  auto before = [&](int64_t a, int64_t b) {
    if (x.group_ids[a] != x.group_ids[b]) return x.group_ids[a] < x.group_ids[b];
    return x.ranks[a] != x.ranks[b] ? x.ranks[a] < x.ranks[b] : a < b;
  };
  if (!std::is_sorted(order.begin(), order.end(), before)) {  // batches often are
    std::sort(order.begin(), order.end(), before);
  }
  return order;
}

std::vector<Span> group_spans(const Inputs& x, const std::vector<int64_t>& order) {
  std::vector<Span> spans;
  const int64_t size = static_cast<int64_t>(order.size());
  for (int64_t begin = 0, end; begin < size; begin = end) {
    for (end = begin + 1; end < size && x.group_ids[order[end]] == x.group_ids[order[begin]];)
      ++end;
    spans.push_back({begin, end});
  }
  return spans;
}

// Answer `i` (score s, margin m) against the answers `worse`, `count` of them; adds their gradients
// to `dworse` and returns that of s.
float add_pairs(float s, float m, float center_coef, const float* worse, float* dworse,
                int64_t count, GroupSums& sums) {
  vfloat loss = broadcast(0.0f), right = loss, difference = loss, ds = loss;
  for_each_vector(count, [&](int64_t j, auto lanes) {
    const vint keep = load_flags(nullptr, lanes);
    const vfloat other = load_first(worse + j, lanes), d = s - other, x = d - m, total = s + other;
    const vfloat e = exp(vmin(x, -x));  // e^-|x|
    const vint negative = x < broadcast(0.0f);
    const vfloat p_wrong = (negative ? broadcast(1.0f) : e) / (e + 1.0f);  // sigmoid(-x)
    const vfloat center = 2.0f * center_coef * total;
    loss +=
        select(keep, log1p(e) + (negative ? -x : broadcast(0.0f)) + center_coef * total * total);
    difference += select(keep, d);
    right += select(keep, d > broadcast(0.0f)    ? broadcast(1.0f)
                          : d == broadcast(0.0f) ? broadcast(0.5f)
                                                 : broadcast(0.0f));
    ds += select(keep, center - p_wrong);
    store_first(dworse + j, lanes, load_first(dworse + j, lanes) + center + p_wrong);
  });
  sums.loss += reduce_add_double(loss);
  sums.right += reduce_add_double(right);
  sums.difference += reduce_add_double(difference);
  sums.pairs += count;
  return static_cast<float>(reduce_add_double(ds));
}

// Mean loss of one group and its gradients, in `dscores` at the answers' own positions. `scores`
// and `gradients` have room for every answer, in order.
GroupSums group_loss(const Inputs& x, const std::vector<int64_t>& order, Span span, float* scores,
                     float* gradients, float* dscores) {
  for (int64_t i = span.begin; i < span.end; ++i) {
    scores[i] = x.scores[order[i]];
    gradients[i] = 0.0f;
  }
  GroupSums sums;
  int64_t worse = span.begin;  // the first
  for (int64_t i = span.begin; i < span.end; ++i) {
    const int64_t at = order[i];
    while (worse < span.end && x.ranks[order[worse]] <= x.ranks[at]) ++worse;
    if (worse == span.end) break;
    gradients[i] += add_pairs(scores[i], x.margins == nullptr ? 0.0f : x.margins[at], x.center_coef,
                              scores + worse, gradients + worse, span.end - worse, sums);
  }
  const double pairs = static_cast<double>(std::max<int64_t>(sums.pairs, 1));
  sums.loss /= pairs;
  for (int64_t i = span.begin; i < span.end; ++i) {
    dscores[order[i]] = static_cast<float>(gradients[i] / pairs);
  }
  return sums;
}

// In the order of RankingStats (fastrl/ops/ranking_loss.py).
void write_stats(const GroupSums& total, int64_t groups, const float* scores, int64_t size,
                 float* stats) {
  const double pairs = static_cast<double>(std::max<int64_t>(total.pairs, 1));
  double mean = 0.0, m2 = 0.0;
  for (int64_t i = 0; i < size; ++i) mean += scores[i];
  mean /= std::max<double>(size, 1.0);
  for (int64_t i = 0; i < size; ++i) m2 += (scores[i] - mean) * (scores[i] - mean);
  const double values[] = {total.right / pairs,
                           static_cast<double>(total.pairs),
                           static_cast<double>(groups),
                           total.difference / pairs,
                           mean,
                           std::sqrt(m2 / std::max<double>(size, 1.0))};
  std::copy(std::begin(values), std::end(values), stats);
}

}  // namespace

void ranking_loss(int64_t size, const float* scores, const int64_t* group_ids, const double* ranks,
                  const float* margins, float center_coef, float* loss, float* stats,
                  float* dscores, int threads) {
  const Inputs x{scores, group_ids, ranks, margins, center_coef};
  check_ranks(ranks, size);
  const std::vector<int64_t> order = sorted_by_group_and_rank(x, size);
  const std::vector<Span> spans = group_spans(x, order);
  std::vector<GroupSums> parts(spans.size());
  std::vector<float> in_order(size), gradients(size);
#pragma omp parallel for num_threads(team(64 * size, threads)) schedule(static)
  for (int64_t g = 0; g < static_cast<int64_t>(spans.size()); ++g) {
    parts[g] = group_loss(x, order, spans[g], in_order.data(), gradients.data(), dscores);
  }
  GroupSums total;
  int64_t groups = 0;
  for (const GroupSums& part : parts) {
    total.loss += part.loss;
    total.right += part.right;
    total.difference += part.difference;
    total.pairs += part.pairs;
    groups += part.pairs > 0;
  }
  const double scale = 1.0 / std::max<double>(groups, 1.0);
  *loss = static_cast<float>(total.loss * scale);
  for (int64_t i = 0; i < size; ++i) dscores[i] = static_cast<float>(dscores[i] * scale);
  write_stats(total, groups, scores, size, stats);
}

}  // namespace fastrl::cpu::FASTRL_ISA
