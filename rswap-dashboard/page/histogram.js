// The agent's log-linear histograms: every power of two in eight buckets (rswap-common/src/histogram.rs).

const SUB_BUCKETS = 8;
const SUB_BUCKET_BITS = 3;

/** The middle of the values that a bucket counts. */
export function middle(index) {
  if (index < SUB_BUCKETS) return index;
  const shift = (index >> SUB_BUCKET_BITS) - 1;
  const mantissa = index - (shift << SUB_BUCKET_BITS);
  const [low, high] = [mantissa * 2 ** shift, (mantissa + 1) * 2 ** shift - 1];
  return low + Math.floor((high - low) / 2);
}

/** What a share `q` of the samples does not exceed; null of none. */
export function quantile(histogram, q) {
  const buckets = histogram?.buckets ?? [];
  const total = buckets.reduce((sum, [, samples]) => sum + samples, 0);
  const rank = Math.min(Math.max(Math.ceil(q * total), 1), Math.max(total, 1));
  let seen = 0;
  for (const [index, samples] of buckets) {
    seen += samples;
    if (seen >= rank) return middle(index);
  }
  return null;
}
