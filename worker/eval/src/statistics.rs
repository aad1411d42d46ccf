//! Means with their standard errors, and quantiles.

use serde::Serialize;

/// A figure and its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Standard error; 0 where a single sample tells nothing of the spread.
    pub standard_error: f64,
}

/// Mean and variance of a stream of values (Welford's recurrence: no cancellation on long streams).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moments {
    count: usize,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
    }

    /// Values so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Standard error of the mean.
    pub fn standard_error(&self) -> f64 {
        // The population's variance over n − 1, which is the sample's over n.
        if self.count > 1 { (self.squares / self.count as f64 / (self.count - 1) as f64).sqrt() } else { 0.0 }
    }

    /// Mean and standard error.
    pub fn estimate(&self) -> Estimate {
        Estimate { value: self.mean, standard_error: self.standard_error() }
    }
}

/// Value at a share of sorted values, between neighbours in proportion; `None` without values.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = share.clamp(0.0, 1.0) * last as f64;
    let below = sorted[place.floor() as usize];
    let above = sorted[place.ceil() as usize];
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_definition() {
        let values = [1.0, 2.0, 4.0, 8.0];
        let mut moments = Moments::default();
        values.iter().for_each(|value| moments.add(*value));
        let variance = values.iter().map(|value| (value - 3.75_f64).powi(2)).sum::<f64>() / 3.0;
        assert!((moments.mean() - 3.75).abs() < 1e-15);
        assert!((moments.standard_error() - (variance / 4.0).sqrt()).abs() < 1e-15);
        let mut single = Moments::default();
        single.add(5.0);
        assert_eq!(single.estimate(), Estimate { value: 5.0, standard_error: 0.0 });
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        let sorted = [0.0, 10.0, 20.0];
        assert_eq!([0.0, 0.25, 0.5, 1.0].map(|share| quantile(&sorted, share)), [Some(0.0), Some(5.0), Some(10.0), Some(20.0)]);
        assert_eq!(quantile(&[], 0.5), None);
    }
}
