"""`depo backtest`: predict the groups of a log, then reveal them. logs -> predictors -> judge -> tables."""
