/** What the buttons of results and receipts do; `main.js` sets the functions. */
export const actions = {};
